"""litellm, as `openai/MODEL` at another address."""

import json
import os

import litellm

SAID = [{"role": "user", "content": "the market fell"}]
at = {"api_base": os.environ["URL"], "api_key": os.environ["TOKEN"], "num_retries": 0}
told = {}
got = litellm.completion("openai/a", messages=SAID, max_tokens=8, **at)
told["chat"] = got.choices[0].message.content
told["tokens"] = got.usage.completion_tokens
pieces = litellm.completion("openai/a", messages=SAID, max_tokens=8, stream=True, **at)
told["chat_stream"] = "".join(piece.choices[0].delta.content or "" for piece in pieces)
got = litellm.text_completion(model="text-completion-openai/a", prompt="the market fell", max_tokens=8, **at)
told["completion"] = got.choices[0].text
got = litellm.embedding(
    "openai/a", input=["the market fell", "a film"], dimensions=16, allowed_openai_params=["dimensions"], **at
)
told["embeddings"] = [each["embedding"] for each in got.data]
try:
    litellm.completion("openai/nobody", messages=SAID, **at)
except litellm.NotFoundError as error:
    told["not_found"] = type(error).__name__
print(json.dumps(told))
