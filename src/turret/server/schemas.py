"""Requests and responses of the questions, in the formats of OpenAI and vLLM; those of chats are in `chat_schemas`.

A request for a text may have unknown keys: the response names them in a header, or the server refuses them with
`--strict`. So no part of a request is silently ignored. `top_k`, `repetition_penalty` and `num_beams` extend OpenAI's
API.
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
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,7}$")]
Grammar = Annotated[str, Field(min_length=1, max_length=limits.MOST_SCHEMA)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=limits.MOST_SCHEMA)]],
    Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True),
]
NO_EFFECT = "Accepted; changes nothing."
Stop = Annotated[str, Field(min_length=1, max_length=256)]
User = Annotated[str, Field(max_length=limits.MOST_UNIT)]
USER = "The unit of an experiment, if there is no Turret-Unit header."


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Lenient(Model):
    """A part of a request that keeps unknown keys, to name them."""

    model_config = ConfigDict(extra="allow")

    def known(self) -> JsonObject:
        """The keys that are known and not null, without those that are not."""
        values = {key: getattr(self, key) for key, field in type(self).model_fields.items() if not field.exclude}
        return {key: _known(value) for key, value in values.items() if value is not None}

    def unknown(self) -> list[str]:
        """The keys that are not known, such as `messages.0.refusal`, unless their value is null or empty."""
        found = [key for key, value in (self.model_extra or {}).items() if value not in (None, [], {})]
        for key in type(self).model_fields:
            value = getattr(self, key)
            parts = [(key, value)] if not isinstance(value, list) else [(f"{key}.{i}", v) for i, v in enumerate(value)]
            found += [f"{name}.{each}" for name, part in parts if isinstance(part, Lenient) for each in part.unknown()]
        return found


def _known(value: JsonValue) -> JsonValue:
    if isinstance(value, list):
        return [_known(each) for each in value]
    return value.known() if isinstance(value, Lenient) else value


# --- requests --------------------------------------------------------------------------------------------------------


class StreamOptions(Lenient):
    include_usage: bool | None = None


def never_together(*pairs: JsonObject) -> JsonObject:
    """Rules for a JSON schema: a request does not have all keys of a pair with these values. pairs: key -> schema."""
    return {"allOf": [{"not": {"required": list(pair), "properties": pair}} for pair in pairs]}


SEVERAL: JsonObject = {"type": "integer", "minimum": 2}


class JsonSchemaFormat(Lenient):
    name: Annotated[str, Field(max_length=256)]
    schema_: JsonObject | None = Field(None, alias="schema", description="A JSON schema; any object if it is missing.")
    description: Text | None = None
    strict: bool | None = Field(None, description="The schema is enforced in any case.")


class TextFormat(Lenient):
    type: Literal["text", "json_object"]


class SchemaFormat(Lenient):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[TextFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Lenient):
    """As vLLM spells it. One of these keys."""

    json_: JsonObject | None = Field(None, alias="json", description="A JSON schema.")
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = Field(None, description="In llguidance's variant of Lark.")
    json_object: bool | None = None


class Generation(Lenient):
    """How to decode. The default of a missing or null key is the adapter's setting, or else the engine's default."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=100_000), WHOLE] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[TokenId, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=limits.MOST_BIASES, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = None
    num_beams: Annotated[int, Field(ge=1, le=16), WHOLE] | None = None
    seed: Annotated[int, Field(ge=1 - (1 << 53), le=(1 << 53) - 1), WHOLE] | None = None  # exact in a float64 of JSON
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.MOST_STOPS, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=limits.MOST_CHOICES), WHOLE] | None = None
    truncate_prompt_tokens: Literal[-1] | Annotated[int, Field(ge=1, le=1 << 17), WHOLE] | None = Field(
        None, description="Cut a prompt with more tokens; -1: one that does not fit."
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | None = Field(None, description="A JSON schema.")
    guided_regex: Grammar | None = None
    guided_choice: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = Field(None, description=USER)
    store: bool | None = Field(None, description=NO_EFFECT)
    service_tier: Annotated[str, Field(max_length=64)] | None = Field(None, description=NO_EFFECT)
    metadata: JsonObject | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = Field(None, description=NO_EFFECT)
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = Field(None, description=NO_EFFECT)

    def logprob_count(self) -> int | None:
        """How many alternatives to give for each token; None for no logprobs."""
        return None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.logprob_count() is not None and (self.num_beams or 1) > 1:
            raise ValueError("logprobs do not work with num_beams: leave out one of them")
        return self

    def stops(self) -> tuple[str, ...] | None:
        if self.stop is None:
            return None
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Generation):
    model_config = ConfigDict(
        json_schema_extra=never_together(
            {"logprobs": {"type": "integer"}, "num_beams": SEVERAL},
            {"best_of": SEVERAL, "num_beams": SEVERAL},
            {"best_of": SEVERAL, "stream": {"const": True}},
            {"best_of": SEVERAL, "echo": {"const": True}},
            {"echo": {"const": True}, "num_beams": SEVERAL},
        )
        | {
            "if": {"required": ["max_tokens"], "properties": {"max_tokens": {"const": 0}}},
            "then": {"required": ["echo"], "properties": {"echo": {"const": True}}},
        }
    )
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=limits.MOST_TOKENS), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=limits.MOST_CHOICES), WHOLE] | None = Field(
        None, description="Answers of each prompt, of which the n most probable by token are given. At least n."
    )
    echo: bool | None = Field(None, description="Begin each text, and its logprobs, with the prompt.")
    logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS), WHOLE] | None = None
    suffix: None = None

    def logprob_count(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        for key, given in (("num_beams", (self.num_beams or 1) > 1), ("stream", self.stream), ("echo", self.echo)):
            if given and (self.best_of or 1) > 1:
                raise ValueError(f"best_of does not work with {key}: leave out one of them")
        if self.echo and (self.num_beams or 1) > 1:
            raise ValueError("echo does not work with num_beams: leave out one of them")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 gives only the prompt: expected echo = true with it")
        return self

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [each for each in self.prompt if isinstance(each, int)]
        return [tokens] if tokens else [each for each in self.prompt if not isinstance(each, int)]


# --- responses -------------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Logprobs by token of the answer; for each of them the most probable tokens at its position, by their text."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None]
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


# --- batch schemas ----------------------------------------------------------------------------------------------------
# Requests and responses of files and batches, in OpenAI's format.


Endpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/classify",
    "/v1/decisions",
    "/v1/systemone",
    "/v1/score",
    "/v1/rerank",
]
Id = Annotated[str, Field(min_length=1, max_length=60)]
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class BatchRequest(Model):
    input_file_id: Id = Field(description="A file of purpose batch: a request on each line.")
    endpoint: Endpoint
    completion_window: Literal["24h"] = "24h"
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class Files(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchError(BaseModel):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
