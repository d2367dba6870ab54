"""Requests and responses of chats, in OpenAI's format. Unknown keys are kept, to be named; see `schemas`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from turret.json_types import JsonObject
from turret.server import limits
from turret.server.routes import NO_EFFECT, SEVERAL, WHOLE, Generation, Lenient, Text, Usage, never_together

# --- requests --------------------------------------------------------------------------------------------------------


class Part(Lenient):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[Part], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
ToolName = Annotated[str, Field(min_length=1, max_length=256)]


class Said(Lenient):
    role: Literal["system", "developer", "user"]
    content: Content
    name: Annotated[str, Field(max_length=256)] | None = Field(None, description="Accepted and ignored.")


class CalledFunction(Lenient):
    name: ToolName
    arguments: Text = Field(description="A JSON object as text.")


class ToolCall(Lenient):
    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"]
    function: CalledFunction


class Answered(Lenient):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MOST_MESSAGES, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = Field(None, description="Accepted and ignored.")


class ToolResult(Lenient):
    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    name: ToolName | None = None


Message = Annotated[Said | Answered | ToolResult, Field(discriminator="role")]


class Function(Lenient):
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema.")
    strict: bool | None = Field(None, description="The schema is enforced if a call is required.", exclude=True)


class Tool(Lenient):
    type: Literal["function"]
    function: Function


class NamedFunction(Lenient):
    name: ToolName


class NamedTool(Lenient):
    type: Literal["function"]
    function: NamedFunction


TRUE: JsonObject = {"const": True}


class ChatRequest(Generation):
    model_config = ConfigDict(
        json_schema_extra=never_together({"logprobs": TRUE, "num_beams": SEVERAL})
        | {
            "anyOf": [
                {"properties": {"top_logprobs": {"type": "null"}}},
                {"required": ["logprobs"], "properties": {"logprobs": TRUE}},
            ],
            "if": {
                "required": ["tool_choice"],
                "properties": {"tool_choice": {"not": {"enum": [None, "none", "auto"]}}},
            },
            "then": {"required": ["tools"], "properties": {"tools": {"type": "array", "minItems": 1}}},
        }
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=limits.MOST_MESSAGES, fail_fast=True)] | None = Field(
        None, description="Written into the prompt, as in training. Calls in the answer are its `tool_calls`."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="`required`, or a tool: the answer is a call whose arguments fit the tool's schema."
    )
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    max_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS), WHOLE] | None = Field(
        None, description="Only with logprobs."
    )

    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs need logprobs: set it to true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools: give them, or leave it out")
        return self


# --- responses -------------------------------------------------------------------------------------------------------


class AnsweredCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AnsweredFunction(BaseModel):
    name: str
    arguments: str = Field(description="A JSON object as text.")


class ChatMessage(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
