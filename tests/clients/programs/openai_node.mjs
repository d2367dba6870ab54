// OpenAI's client for JavaScript.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.URL, apiKey: process.env.TOKEN, maxRetries: 0 });
const messages = [{ role: "user", content: "the market fell" }];
const told = { models: [] };
for await (const model of client.models.list()) told.models.push(model.id);
const chat = { model: "a", messages, max_tokens: 8 };
told.chat = (await client.chat.completions.create(chat)).choices[0].message.content;
told.chat_stream = "";
for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
  told.chat_stream += chunk.choices[0]?.delta?.content ?? "";
}
told.completion = (await client.completions.create({ model: "a", prompt: "the market fell", max_tokens: 8 })).choices[0].text;
const embedded = await client.embeddings.create({ model: "a", input: ["the market fell", "a film"], dimensions: 16 });
told.embeddings = embedded.data.map((each) => each.embedding);
const asked = { model: "a", input: "the market fell", max_output_tokens: 8 };
told.response = (await client.responses.create(asked)).output_text;
told.response_stream = "";
for await (const event of await client.responses.create({ ...asked, stream: true })) {
  if (event.type === "response.output_text.delta") told.response_stream += event.delta;
}
try {
  await client.completions.create({ model: "nobody", prompt: "x" });
} catch (error) {
  told.not_found = error.constructor.name;
}
console.log(JSON.stringify(told));
