"""langchain-openai: structured output by each method, and tools. BASE: a model that is constrained; see `scribe`."""

import json
import os
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.runnables import Runnable
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Review(BaseModel):
    """A review."""

    good: bool
    tone: Literal["calm", "loud"]


def model(name: str, **more: object) -> ChatOpenAI:
    at = {"base_url": os.environ["URL"], "api_key": os.environ["TOKEN"], "max_retries": 0, "max_tokens": 300}
    return ChatOpenAI(model=name, temperature=1.0 if name == "base" else 0.0, **at, **more)


def review(asked: Runnable) -> dict[str, object]:
    """A structured answer. An arbitrary base that may add keys writes too many now and then: it is asked again."""
    for _ in range(5):
        if (got := asked.invoke("a great film")) is not None:
            return got.model_dump()
    raise ValueError("no answer had the form")


told = {"structured": {}}
for method, name in (("json_schema", "base"), ("function_calling", "base"), ("json_mode", "json")):
    told["structured"][method] = review(model(name).with_structured_output(Review, method=method))
strict = model("base").with_structured_output(Review, method="function_calling", strict=True)
told["structured"]["function_calling, strict"] = review(strict)
responses = model("base", use_responses_api=True)
for method in ("json_schema", "function_calling"):
    told["structured"][f"{method}, responses"] = review(responses.with_structured_output(Review, method=method))
for name, strict in (("required", True), ("required, with keys of its own", None)):
    required = model("base").bind_tools([Review], tool_choice="required", strict=strict)
    answers = (required.invoke("a great film").tool_calls for _ in range(5))
    told[name] = [call["args"] for call in next(filter(None, answers), [])]
caller = model("caller").bind_tools([Review])
asked = HumanMessage("a great film")
answer = caller.invoke([asked])
told["calls"] = [call["args"] for call in answer.tool_calls]
pieces = None
for piece in caller.stream([asked]):
    pieces = piece if pieces is None else pieces + piece
told["streamed"] = [call["args"] for call in pieces.tool_calls]
results = [ToolMessage("noted", tool_call_id=call["id"]) for call in answer.tool_calls]
told["after"] = type(caller.invoke([asked, answer, *results])).__name__
print(json.dumps(told))
