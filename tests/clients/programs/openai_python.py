"""OpenAI's Python client: every resource that the server has."""

import asyncio
import io
import json
import os
import time

import openai

URL, TOKEN = os.environ["URL"], os.environ["TOKEN"]
SAID = [{"role": "user", "content": "the market fell"}]
client = openai.OpenAI(base_url=URL, api_key=TOKEN, max_retries=0)
told = {"models": [model.id for model in client.models.list()]}
told["chat"] = client.chat.completions.create(model="a", messages=SAID, max_tokens=8).choices[0].message.content
stream = client.chat.completions.create(model="a", messages=SAID, max_tokens=8, stream=True)
told["chat_stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
told["completion"] = client.completions.create(model="a", prompt="the market fell", max_tokens=8).choices[0].text
stream = client.completions.create(model="a", prompt="the market fell", max_tokens=8, stream=True)
told["completion_stream"] = "".join(chunk.choices[0].text for chunk in stream)
got = client.embeddings.create(model="a", input=["the market fell", "a film"], dimensions=16)
told["embeddings"] = [each.embedding for each in got.data]
told["response"] = client.responses.create(model="a", input="the market fell", max_output_tokens=8).output_text
with client.responses.create(model="a", input="the market fell", max_output_tokens=8, stream=True) as events:
    told["response_stream"] = "".join(each.delta for each in events if each.type == "response.output_text.delta")


async def streams() -> list[str]:
    async with openai.AsyncOpenAI(base_url=URL, api_key=TOKEN, max_retries=0) as other:
        asked = [other.chat.completions.create(model="a", messages=SAID, max_tokens=8) for _ in range(8)]
        return [each.choices[0].message.content for each in await asyncio.gather(*asked)]


told["at_once"] = sorted(set(asyncio.run(streams())))
lines = [
    {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "a", "messages": SAID, "max_tokens": 8}}
    for n in range(3)
]  # fmt: skip
file = client.files.create(file=("x.jsonl", io.BytesIO("\n".join(map(json.dumps, lines)).encode())), purpose="batch")
batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
while batch.status not in ("completed", "failed"):
    time.sleep(0.1)
    batch = client.batches.retrieve(batch.id)
answers = [json.loads(each) for each in client.files.content(batch.output_file_id).text.splitlines()]
told["batch"] = [each["response"]["body"]["choices"][0]["message"]["content"] for each in answers]
for key, ask in {
    "not_found": lambda: client.completions.create(model="nobody", prompt="x"),
    "bad_request": lambda: client.completions.create(model="a", prompt="x", max_tokens=10**9),
    "unauthorized": lambda: client.with_options(api_key="turret-nobody").models.list(),
}.items():
    try:
        ask()
    except openai.APIStatusError as error:
        told[key] = type(error).__name__
print(json.dumps(told))
