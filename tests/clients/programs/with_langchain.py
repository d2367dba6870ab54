"""langchain-openai: chats, streams, completions, embeddings."""

import json
import os

from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

at = {"base_url": os.environ["URL"], "api_key": os.environ["TOKEN"], "max_retries": 0}
chat = ChatOpenAI(model="a", max_tokens=8, **at)
told = {"chat": chat.invoke("the market fell").content}
told["chat_stream"] = "".join(piece.content for piece in chat.stream("the market fell"))
told["chats"] = [each.content for each in chat.batch(["the market fell"] * 3)]
told["completion"] = OpenAI(model="a", max_tokens=8, temperature=0, top_p=1, **at).invoke("the market fell")
# without tiktoken, whose vocabulary is a download: texts are sent as they are
embeddings = OpenAIEmbeddings(model="a", dimensions=16, check_embedding_ctx_length=False, **at)
told["embeddings"] = embeddings.embed_documents(["the market fell", "a film"])
told["query"] = embeddings.embed_query("a film")
print(json.dumps(told))
