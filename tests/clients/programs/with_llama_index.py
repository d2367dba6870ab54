"""llama-index's OpenAILike."""

import json
import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

at = {"api_base": os.environ["URL"], "api_key": os.environ["TOKEN"], "max_retries": 0, "max_tokens": 8}
chat, plain = (OpenAILike(model="a", is_chat_model=kind, temperature=0.0, **at) for kind in (True, False))
said = [ChatMessage(role="user", content="the market fell")]
told = {"chat": chat.chat(said).message.content}
told["chat_stream"] = "".join(piece.delta or "" for piece in chat.stream_chat(said))
told["completion"] = plain.complete("the market fell").text
told["completion_stream"] = "".join(piece.delta or "" for piece in plain.stream_complete("the market fell"))
print(json.dumps(told))
