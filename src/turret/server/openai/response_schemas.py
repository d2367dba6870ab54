"""Requests and responses of `/v1/responses`, in OpenAI's format. Unknown keys are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from turret.json_types import JsonObject, Plain
from turret.server import limits
from turret.server.openai.chat_schemas import ToolName
from turret.server.routes import NO_EFFECT, USER, WHOLE, Model, Name, Text, User

# --- requests --------------------------------------------------------------------------------------------------------

Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
OF_OUTPUT = "As in the output of an earlier response. " + NO_EFFECT


class Given(Model):
    """A part of the input, which may be a part of an earlier output: clients give keys that they do not use as null."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Plain) -> Plain:
        return {key: each for key, each in given.items() if each is not None} if isinstance(given, dict) else given


class TextPart(Given):
    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[JsonObject] | None = Field(None, description=OF_OUTPUT)
    logprobs: list[JsonObject] | None = Field(None, description=OF_OUTPUT)


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]


def text_of(content: str | list[TextPart]) -> str:
    """The text of a content, its parts joined."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class InputMessage(Given):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Id | None = Field(None, description=OF_OUTPUT)
    status: Status | None = Field(None, description=OF_OUTPUT)


class InputCall(Given):
    """A call of a tool, as an earlier response gave it."""

    type: Literal["function_call"]
    call_id: Id
    name: ToolName
    arguments: Text = Field(description="A JSON object as text.")
    id: Id | None = Field(None, description=OF_OUTPUT)
    status: Status | None = Field(None, description=OF_OUTPUT)


class CallOutput(Given):
    """What a tool gave."""

    type: Literal["function_call_output"]
    call_id: Id
    output: Content
    id: Id | None = Field(None, description=NO_EFFECT)
    status: Status | None = Field(None, description=NO_EFFECT)


def _kind(item: Plain | InputItemTypes) -> str:
    """The `type` of an input item; a message may have none."""
    kind = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


InputItemTypes = InputMessage | InputCall | CallOutput
InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Model):
    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema.")
    strict: bool | None = Field(None, description="The schema is enforced if a call is required.")


class FunctionChoice(Model):
    type: Literal["function"]
    name: ToolName


class PlainFormat(Model):
    type: Literal["text", "json_object"]


class SchemaFormat(Model):
    type: Literal["json_schema"]
    name: Id
    schema_: JsonObject = Field(alias="schema", description="A JSON schema.")
    description: Text | None = None
    strict: bool | None = Field(None, description="The schema is enforced in any case.")


class TextSettings(Model):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponseRequest(Model):
    model_config = ConfigDict(
        json_schema_extra={
            "if": {
                "required": ["tool_choice"],
                "properties": {"tool_choice": {"not": {"enum": [None, "none", "auto"]}}},
            },
            "then": {"required": ["tools"], "properties": {"tools": {"type": "array", "minItems": 1}}},
        }
    )
    model: Name
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=limits.MOST_MESSAGES - 1, fail_fast=True)]
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextSettings | None = Field(None, description="The form of the answer, unless a call of a tool is required.")
    tools: Annotated[list[FunctionTool], Field(max_length=limits.MOST_MESSAGES, fail_fast=True)] | None = Field(
        None, description="Written into the prompt, as in training. Calls in the answer are items of the output."
    )
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = Field(
        None, description="`required`, or a tool: the answer is a call whose arguments fit the tool's schema."
    )
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    stream: bool | None = None
    store: Literal[False] | None = Field(None, description="Only false: no response is kept.")
    user: User | None = Field(None, description=USER)

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools: give them, or leave it out")
        return self


# --- responses -------------------------------------------------------------------------------------------------------


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[JsonObject] = []
    logprobs: list[JsonObject] = []


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputCall(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str = Field(description="A JSON object as text.")


OutputItem = OutputMessage | OutputCall


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


class ResponseObject(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str = Field(description="The version that answered, such as name@3.")
    output: list[OutputItem]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None = None
    text: JsonObject = Field(description="As in the request.")
    tool_choice: str | JsonObject = "auto"
    tools: list[JsonObject] = []
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
