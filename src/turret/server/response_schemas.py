"""Requests and responses of `/v1/responses`, in OpenAI's format: the plain subset. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from turret.json_types import JsonObject
from turret.server import limits
from turret.server.schemas import USER, WHOLE, Model, Name, Text, User


class TextPart(Model):
    type: Literal["input_text", "output_text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]


class InputMessage(Model):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseRequest(Model):
    model: Name
    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    store: Literal[False] | None = Field(None, description="Only false: no response is kept.")
    user: User | None = Field(None, description=USER)


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[JsonObject] = []
    logprobs: list[JsonObject] = []


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class TokenDetails(BaseModel):
    cached_tokens: int = 0


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Incomplete(BaseModel):
    reason: Literal["max_output_tokens"]


class Format(BaseModel):
    type: Literal["text"] = "text"


class TextSettings(BaseModel):
    format: Format = Format()


class ResponseObject(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str = Field(description="The version that answered, such as name@3.")
    output: list[OutputMessage]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None = None
    text: TextSettings = TextSettings()
    tool_choice: Literal["auto"] = "auto"
    tools: list[JsonObject] = []
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
