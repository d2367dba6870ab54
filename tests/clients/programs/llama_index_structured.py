"""llama-index's OpenAILike: structured output by a schema and by a call of a tool. See `scribe`."""

import json
import os
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Review(BaseModel):
    """A review."""

    good: bool
    tone: Literal["calm", "loud"]


def model(name: str, **more: object) -> OpenAILike:
    at = {"api_base": os.environ["URL"], "api_key": os.environ["TOKEN"], "max_retries": 0, "max_tokens": 300}
    return OpenAILike(model=name, is_chat_model=True, temperature=1.0 if name == "base" else 0.0, **at, **more)


said = PromptTemplate("a {what} film")
schema = model("base", should_use_structured_outputs=True)
called = model("base", is_function_calling_model=True)
told = {
    "schema": schema.structured_predict(Review, said, what="great").model_dump(),
    "call": called.structured_predict(Review, said, what="great").model_dump(),
    "chat": schema.as_structured_llm(Review).chat([ChatMessage(role="user", content="a film")]).raw.model_dump(),
}


def review(good: bool, tone: Literal["calm", "loud"]) -> str:
    """A review."""
    return f"{good} {tone}"


tool = FunctionTool.from_defaults(review, name="Review")
answer = model("caller", is_function_calling_model=True).chat_with_tools([tool], user_msg="a great film")
told["tools"] = [each.tool_kwargs for each in model("caller").get_tool_calls_from_response(answer)]
print(json.dumps(told))
