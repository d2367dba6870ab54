"""What goes over the wire, as OpenAI and vLLM say it, and what of it is taken. Unknown keys are refused.

A key that is known elsewhere and would change an answer is taken at the value that changes nothing, and refused at any
other: a request is never half carried out. Keys beyond OpenAI's: `top_k`, `repetition_penalty`, `num_beams`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from turret.server.limits import (
    MOST_CHOICES,
    MOST_INPUTS,
    MOST_LOGPROBS,
    MOST_MESSAGES,
    MOST_STOPS,
    MOST_TEXT,
    MOST_TOKENS,
    MOST_UNIT,
)


def _is_whole(given: Any) -> bool:
    return isinstance(given, float) and given.is_integer()


Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=200,
        description="An adapter: name, name@3 or name@production; or the id of the base.",
    ),
]
Text = Annotated[str, Field(max_length=MOST_TEXT)]
# JSON knows one kind of number: 5.0 is a whole one.
WHOLE = BeforeValidator(lambda given: int(given) if _is_whole(given) else given)
Tokens = Annotated[
    list[Annotated[int, Field(ge=0, le=10_000_000), WHOLE]], Field(min_length=1, max_length=1 << 17, fail_fast=True)
]
Nothing = Annotated[float, Field(ge=0, le=0)] | None  # a penalty that changes nothing
Stop = Annotated[str, Field(min_length=1, max_length=256)]
User = Annotated[str, Field(max_length=MOST_UNIT)]
USER: Any = Field(None, description="Whose request it is: what an experiment assigns, without a Turret-Unit header.")


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# --- questions -------------------------------------------------------------------------------------------------------


class StreamOptions(Model):
    include_usage: bool | None = None


def _told_alone(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    """For a schema: where logprobs are wanted, no stream and no beams. logprobs: what wants them."""
    others: dict[str, dict[str, Any]] = {"stream": {"const": True}, "num_beams": {"type": "integer", "minimum": 2}}
    return [
        {"not": {"required": ["logprobs", key], "properties": {"logprobs": logprobs, key: value}}}
        for key, value in others.items()
    ]


class Generation(Model):
    """How to decode; what is left out or null is the adapter's own setting, else the engine's default."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=100_000), WHOLE] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=16), WHOLE] | None = None
    seed: Annotated[int, Field(ge=1 - (1 << 53), le=(1 << 53) - 1), WHOLE] | None = None  # as JSON carries it safely
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = USER
    presence_penalty: Nothing = Field(None, description="Only 0.")
    frequency_penalty: Nothing = Field(None, description="Only 0.")
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(None, description="Only empty.")

    def told(self) -> int | None:
        """How many alternatives are told beside each token; None where nothing is."""
        return None

    @model_validator(mode="after")
    def _told_of_whole_single_texts(self) -> Self:
        if self.told() is not None and self.stream:
            raise ValueError("logprobs are told with a whole answer: leave out stream, or logprobs")
        if self.told() is not None and (self.num_beams or 1) > 1:
            raise ValueError("logprobs are told of single texts: leave out num_beams, or logprobs")
        return self

    def stops(self) -> tuple[str, ...] | None:
        if self.stop is None:
            return None
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Generation):
    model_config = ConfigDict(json_schema_extra={"allOf": _told_alone({"type": "integer"})})  # type: ignore[dict-item]
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] | None = None
    best_of: Literal[1] | None = Field(None, description="Only 1.")
    echo: Literal[False] | None = Field(None, description="Only false.")
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    suffix: None = None

    def told(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class Part(Model):
    type: Literal["text"]
    text: Text


class Message(Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    name: Annotated[str, Field(max_length=256)] | None = Field(None, description="Taken, and not used.")

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Model):
    type: Literal["text"]


class ChatRequest(Generation):
    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                *_told_alone({"const": True}),
                {"anyOf": [
                    {"properties": {"top_logprobs": {"type": "null"}}},
                    {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
                ]},
            ]
        }
    )  # fmt: skip
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = Field(
        None, description="Only with logprobs."
    )
    response_format: ResponseFormat | None = None

    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are told with logprobs: set it to true")
        return self


class ClassifyRequest(Model):
    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
    user: User | None = USER

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


# --- answers ---------------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """A number and a text for each token of the answer; the top ones in its place by their texts."""

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
    label: str | list[str] = Field(description="A list where the task has many labels at once.")
    probs: list[float]
    num_classes: int
    probabilities: dict[str, float] = Field(description="Label to probability, in the order of `probs`.")


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
    root: str = Field(description="The version that it means here now, or the base.")
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
