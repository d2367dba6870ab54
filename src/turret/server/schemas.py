"""Requests and responses of the questions, in the formats of OpenAI and vLLM. Unknown keys are refused.

A key of OpenAI's API that Turret does not offer is accepted only at the value that changes nothing, so no part of a
request is silently ignored. `top_k`, `repetition_penalty` and `num_beams` extend OpenAI's API.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from turret.json_types import JsonObject, JsonValue
from turret.server import limits


def _whole(value: JsonValue) -> JsonValue:
    """5.0 -> 5: JSON has one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=200,
        description="An adapter: name, name@3 or name@production; or the id of the base.",
    ),
]
Text = Annotated[str, Field(max_length=limits.MOST_TEXT)]
WHOLE = BeforeValidator(_whole)
Tokens = Annotated[
    list[Annotated[int, Field(ge=0, le=10_000_000), WHOLE]], Field(min_length=1, max_length=1 << 17, fail_fast=True)
]
Zero = Annotated[float, Field(ge=0, le=0)] | None  # a penalty that changes nothing
Stop = Annotated[str, Field(min_length=1, max_length=256)]
User = Annotated[str, Field(max_length=limits.MOST_UNIT)]
USER = "The unit of an experiment, if there is no Turret-Unit header."


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# --- requests --------------------------------------------------------------------------------------------------------


class StreamOptions(Model):
    include_usage: bool | None = None


def _schema_extra(logprobs: JsonObject, *more: JsonObject) -> JsonObject:
    """Rules for a JSON schema: no logprobs with a stream or with beams. logprobs: their value in such a request."""
    others: JsonObject = {"stream": {"const": True}, "num_beams": {"type": "integer", "minimum": 2}}
    rules: list[JsonObject] = [
        {"not": {"required": ["logprobs", key], "properties": {"logprobs": logprobs, key: value}}}
        for key, value in others.items()
    ]
    return {"allOf": [*rules, *more]}


class Generation(Model):
    """How to decode. The default of a missing or null key is the adapter's setting, or else the engine's default."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=100_000), WHOLE] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=16), WHOLE] | None = None
    seed: Annotated[int, Field(ge=1 - (1 << 53), le=(1 << 53) - 1), WHOLE] | None = None  # exact in a float64 of JSON
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.MOST_STOPS, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=limits.MOST_CHOICES), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = Field(None, description=USER)
    presence_penalty: Zero = Field(None, description="Only 0.")
    frequency_penalty: Zero = Field(None, description="Only 0.")
    logit_bias: Annotated[JsonObject, Field(max_length=0)] | None = Field(None, description="Only empty.")

    def logprob_count(self) -> int | None:
        """How many alternatives to give for each token; None for no logprobs."""
        return None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.logprob_count() is not None and self.stream:
            raise ValueError("logprobs do not work with stream: leave out one of them")
        if self.logprob_count() is not None and (self.num_beams or 1) > 1:
            raise ValueError("logprobs do not work with num_beams: leave out one of them")
        return self

    def stops(self) -> tuple[str, ...] | None:
        if self.stop is None:
            return None
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Generation):
    model_config = ConfigDict(json_schema_extra=_schema_extra({"type": "integer"}))
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    best_of: Literal[1] | None = Field(None, description="Only 1.")
    echo: Literal[False] | None = Field(None, description="Only false.")
    logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS), WHOLE] | None = None
    suffix: None = None

    def logprob_count(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [each for each in self.prompt if isinstance(each, int)]
        return [tokens] if tokens else [each for each in self.prompt if not isinstance(each, int)]


class Part(Model):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[Part], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
ToolName = Annotated[str, Field(min_length=1, max_length=256)]


class Said(Model):
    role: Literal["system", "developer", "user"]
    content: Content
    name: Annotated[str, Field(max_length=256)] | None = Field(None, description="Accepted and ignored.")


class CalledFunction(Model):
    name: ToolName
    arguments: Text = Field(description="A JSON object as text.")


class ToolCall(Model):
    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"]
    function: CalledFunction


class Answered(Model):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MOST_MESSAGES, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = Field(None, description="Accepted and ignored.")


class ToolResult(Model):
    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    name: ToolName | None = None


Message = Annotated[Said | Answered | ToolResult, Field(discriminator="role")]


class Function(Model):
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema.")


class Tool(Model):
    type: Literal["function"]
    function: Function


class ResponseFormat(Model):
    type: Literal["text"]


class ChatRequest(Generation):
    model_config = ConfigDict(
        json_schema_extra=_schema_extra(
            {"const": True},
            {"anyOf": [
                {"properties": {"top_logprobs": {"type": "null"}}},
                {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
            ]},
        )
    )  # fmt: skip
    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=limits.MOST_MESSAGES, fail_fast=True)] | None = Field(
        None, description="Written into the prompt, as in training. A call in the answer is part of its text."
    )
    max_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS), WHOLE] | None = Field(
        None, description="Only with logprobs."
    )
    response_format: ResponseFormat | None = None

    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs need logprobs: set it to true")
        return self


class ClassifyRequest(Model):
    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
    coverage: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Also answer with sets of labels that hold the right one with at least this probability."
    )
    user: User | None = Field(None, description=USER)

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


# --- responses -------------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Logprobs by token of the answer; for each of them the most probable tokens at its position, by their text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="Where each token begins in the text, in characters.")


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str = Field(description="The version that answered, such as name@3.")
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


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


class ClassifyData(BaseModel):
    index: int
    label: str | list[str] = Field(description="A list if the task has several labels per text.")
    probs: list[float]
    num_classes: int
    probabilities: dict[str, float] = Field(description="Label to probability, in the order of `probs`.")
    label_set: list[str] | None = Field(None, description="With `coverage`: the labels, the most probable first.")


class Classification(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifyData]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["turret"] = "turret"
    root: str = Field(description="The version that the id means here now, or the base.")
    parent: str | None = Field(description="The base of an adapter.")
    task: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    error: ErrorBody
