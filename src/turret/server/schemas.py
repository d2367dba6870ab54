"""What requests and responses of several routes are made of, in the formats of OpenAI and vLLM.

A request for a text may have unknown keys: the response names them in a header, or the server refuses them with
`--strict`. So no part of a request is silently ignored. `top_k`, `repetition_penalty` and `num_beams` extend OpenAI's
API.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from turret.experiments.experiment import MOST_ARMS
from turret.json_types import JsonObject, JsonValue, Plain
from turret.server import limits


def _whole(value: Plain) -> Plain:
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


# An invalid name is 404, like an unknown one: `turret.reference` checks it.
Reference = Annotated[str, Field(min_length=1, max_length=200)]
AdapterName = Annotated[str, Field(min_length=1, max_length=200)]
AliasName = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Gate = Annotated[
    str,
    Field(max_length=300, pattern=r"^[^<>=\x00-\x1f]{1,200}(>=|<=|>|<)-?[0-9]{1,15}(\.[0-9]{1,15})?(e-?[0-9]{1,2})?$"),
]
Share = Annotated[float, Field(ge=0, le=1)]
ArmName = Annotated[str, Field(min_length=1, max_length=200)]
Shares = Share | Annotated[dict[ArmName, Share], Field(min_length=1, max_length=MOST_ARMS)]


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


Known: TypeAlias = "Lenient | Plain | Sequence[Known]"  # a value in a request


def _known(value: Known) -> JsonValue:
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


# --- responses -------------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    error: ErrorBody
