"""What all routes share: the server as its caller sees it, units, schemas, strict JSON bodies, sent files.

Also asks a route in this process, for batches and for pages.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Required, Self, TypeAlias, TypedDict

from fastapi import APIRouter, Depends, Request, Response, Security, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import from_json
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.errors import BadRequest, Disconnected, TooLarge, printable
from turret.experiments.experiment import MOST_ARMS
from turret.json_types import JsonObject, JsonValue, Plain
from turret.reference import ALIAS, check_alias
from turret.server import limits, services
from turret.server.auth import Caller, access_of
from turret.server.error_responses import as_bad_request
from turret.server.limits import RequestLimits, replay_body
from turret.store.client_files import TABLE, ClientFile
from turret.store.gates import GATE, Gate
from turret.workspace.queueing import require_table_name

# --- schemas ----------------------------------------------------------------------------------------------------------
# What requests and responses of several routes are made of, in the formats of OpenAI and vLLM.
#
# A request for a text may have unknown keys: the response names them in a header, or the server refuses them with
# `--strict`. So no part of a request is silently ignored. `top_k`, `repetition_penalty` and `num_beams` extend OpenAI's
# API.


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
Texts = Annotated[list[Text], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
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


def check_alias_name(text: str) -> str:
    """The text if it is a valid alias. Raises BadRequest, which says more than a pattern that does not match."""
    with as_bad_request():
        return check_alias(text)


AliasName = Annotated[
    str,
    Field(min_length=1, max_length=32, json_schema_extra={"pattern": f"^{ALIAS.pattern}$"}),
    AfterValidator(check_alias_name),
]


def check_gate(text: str) -> str:
    """The text if it is a valid gate. Raises BadRequest, as `check_alias_name` does."""
    with as_bad_request():
        Gate.parse(text)
    return text


GateText = Annotated[
    str, Field(max_length=300, json_schema_extra={"pattern": f"^{GATE.pattern}$"}), AfterValidator(check_gate)
]
Share = Annotated[float, Field(ge=0, le=1)]
ArmName = Annotated[str, Field(min_length=1, max_length=200)]
Shares = Share | Annotated[dict[ArmName, Share], Field(min_length=1, max_length=MOST_ARMS)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Lenient(Model):
    """A part of a request that keeps unknown keys, to name them."""

    model_config = ConfigDict(extra="allow")

    def known_fields(self) -> JsonObject:
        """The keys that are known and not null, without those that are not."""
        values = {key: getattr(self, key) for key, field in type(self).model_fields.items() if not field.exclude}
        return {key: _known_value(value) for key, value in values.items() if value is not None}

    def unknown(self) -> list[str]:
        """The keys that are not known, such as `messages.0.refusal`, unless their value is null or empty."""
        found = [key for key, value in (self.model_extra or {}).items() if value not in (None, [], {})]
        for key in type(self).model_fields:
            value = getattr(self, key)
            parts = [(key, value)] if not isinstance(value, list) else [(f"{key}.{i}", v) for i, v in enumerate(value)]
            found += [f"{name}.{each}" for name, part in parts if isinstance(part, Lenient) for each in part.unknown()]
        return found


Known: TypeAlias = "Lenient | Plain | Sequence[Known]"  # a value in a request


def _known_value(value: Known) -> JsonValue:
    if isinstance(value, list):
        return [_known_value(each) for each in value]
    return value.known_fields() if isinstance(value, Lenient) else value


# --- requests --------------------------------------------------------------------------------------------------------


class StreamOptions(Lenient):
    include_usage: bool | None = None


def never_together(*pairs: JsonObject) -> JsonObject:
    """Rules for a JSON schema: a request does not have all keys of a pair with these values. pairs: key -> schema."""
    return {"allOf": [{"not": {"required": list(pair), "properties": pair}} for pair in pairs]}


SEVERAL: JsonObject = {"type": "integer", "minimum": 2}


def inputs_in(given: str | Sequence[str] | Sequence[int] | Sequence[list[int]]) -> list[str | list[int]]:
    """The inputs of a request: one text or many, the token ids of one text, or those of many."""
    if isinstance(given, str):
        return [given]
    tokens = [each for each in given if isinstance(each, int)]
    return [tokens] if tokens else [each for each in given if not isinstance(each, int)]


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


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    error: ErrorBody


# --- bodies -----------------------------------------------------------------------------------------------------------
# Read a JSON body as the model of a route, in bounded time.
#
# Parsing and validation take time by the number of keys and values, not by the number of bytes, and both hold Python's
# global lock. So keys and values are counted before a body is parsed, and a large body is then read on a thread.


INLINE = 64 << 10  # bytes; a larger body is read on a thread
Body: TypeAlias = BaseModel | Sequence[BaseModel]  # what a route receives


class BodyField(Protocol):
    """FastAPI's field of the body of a route."""

    def validate(
        self, value: Plain, values: dict[str, Plain], *, loc: tuple[int | str, ...] = ()
    ) -> tuple[Body, list[JsonObject]]: ...


def parse_body(content: bytes, field: BodyField, limits: RequestLimits) -> Body:
    """The body as the model of its route. Raises TooLarge, HTTPException (not JSON) and RequestValidationError."""
    check_counts(content, limits)
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if overflows(value):
        raise HTTPException(400, "the body has a number that no float holds, such as 1e400: give a smaller one")
    body, errors = field.validate(value, {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors, body=value)
    return body


def overflows(value: Plain) -> bool:
    """Whether a number in a value of JSON was too large, so that it was read as infinity."""
    if isinstance(value, float):
        return math.isinf(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(overflows, inner))


def check_counts(content: bytes, limits: RequestLimits) -> None:
    """Raises TooLarge. Exact for JSON; for anything else, the parser stops before it reads more than was counted."""
    if _keys(content) <= limits.body_keys and _values(content) <= limits.body_values:
        return  # the counts include the characters in strings, and are within the limits all the same
    outside = _outside_strings(content, limit=1 + limits.body_keys + limits.body_values)
    for name, count, limit in (
        ("keys", _keys(outside), limits.body_keys),
        ("values", _values(outside), limits.body_values),
    ):
        if count > limit:
            raise TooLarge(f"the body has more than {limit} {name}: send what it asks in several requests")


def _keys(text: bytes) -> int:
    return text.count(b":")


def _values(text: bytes) -> int:
    """Every value but the first follows a comma, or is the first one in a list or an object."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _outside_strings(content: bytes, limit: int) -> bytes:
    """The body without its strings. limit: of strings, checked before the body is split at them."""
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 2 * limit:
        raise TooLarge(f"the body has more than {limit} strings: send what it asks in several requests")
    return b"".join(plain.split(b'"')[::2])


# --- routes -----------------------------------------------------------------------------------------------------------


_BEARER = HTTPBearer(auto_error=False, description="A token of `turret token create`.")
ERRORS: dict[int | str, dict[str, type[Error] | str]] = {
    "4XX": {"model": Error, "description": "What was wrong with the request, in OpenAI's format."},
    "5XX": {"model": Error, "description": "Why the server could not answer, in OpenAI's format."},
}


def _view(request: Request) -> services.View:
    """The server as the caller sees it."""
    server: services.Services = request.app.state.services
    return server.view(access_of(request))


View: TypeAlias = Annotated[services.View, Depends(_view)]


class PlainRequest(Request):
    """A request without `cookies`: FastAPI would read them all for each route, in quadratic time for backslashes."""

    @property
    def cookies(self) -> dict[str, str]:
        """None: `cookie_value` reads the one that is meant."""
        return {}


class PageRoute(APIRoute):
    """A route of the pages."""

    # Any, Any: the yield and send types of every coroutine.
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            plain = PlainRequest(request.scope, request.receive, request._send)
            try:
                return await handler(plain)
            finally:
                await plain.close()  # the file of its form

        return handle


class ParsedRequest(PlainRequest):
    """A request whose body is parsed already."""

    body_value: Body | None = None  # FastAPI uses an instance of the route's model unchanged

    async def json(self) -> Body | None:
        return self.body_value


class StrictRoute(APIRoute):
    """A route whose body is strict JSON (UTF-8, no NaN) within the limits. A large body is parsed on a thread."""

    # Any, Any: the yield and send types of every coroutine.
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler, field = super().get_route_handler(), self.body_field

        async def handle(request: Request) -> Response:
            parsed = ParsedRequest(request.scope, request.receive, request._send)
            if field is not None and (content := await parsed.body()):
                view = _view(request)
                if len(content) <= INLINE:
                    parsed.body_value = parse_body(content, field, view.services.limits)
                else:
                    parsed.body_value = await view.parsing(parse_body, content, field, view.services.limits)
            return await handler(parsed)

        return handle


def router(scope: str) -> APIRouter:
    """A router whose description asks for a token with the scope. The auth middleware checks it."""
    return APIRouter(
        route_class=StrictRoute, responses=ERRORS, tags=[scope], dependencies=[Security(_BEARER)] if scope else []
    )


# --- asking a route in this process -----------------------------------------------------------------------------------


class RequestState(TypedDict, total=False):
    """What the auth middleware knows of a request. priority: of its work. The others are of the log."""

    caller: Required[Caller]
    priority: int
    request_id: str
    log_fields: dict[str, JsonValue]


async def pass_to_route(
    app: ASGIApp, path: str, body: bytes, state: RequestState, receive: Receive, send: Send
) -> None:
    """Send a JSON body to a route of the API, as the caller in `state`. receive: gives what follows the body."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "client": None,
        "server": None,
        "headers": [(b"content-type", b"application/json")],
        "state": state,
    }
    await app(scope, replay_body(body, receive), send)


async def answer_of_route(
    app: ASGIApp, path: str, body: bytes, state: RequestState, receive: Receive
) -> tuple[int, dict[str, str], bytes]:
    """The status, headers and body of the answer, as of `pass_to_route`."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await pass_to_route(app, path, body, state, receive, send)
    start = sent[0]
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}
    return int(start["status"]), headers, b"".join(each.get("body", b"") for each in sent[1:])


# --- uploads ----------------------------------------------------------------------------------------------------------
# Files that clients send: over `/v1/files`, and in a form of the console. A file belongs to the token that sent it.


BATCH = "batch"  # the purpose of a file with requests
PURPOSES = (BATCH, TABLE)
PIECE = 1 << 20  # bytes of a file that are in memory at a time
MOST_FIELD = 1024  # bytes of a field beside the file
FileId = Annotated[str, params.Path(min_length=1, max_length=60)]  # in an address


def owner_of(request: Request) -> str:
    """Whose files and batches the caller has; "" on a server without tokens."""
    caller: Caller = request.state.caller
    return "" if caller.name is None else caller.key


Owner: TypeAlias = Annotated[str, Depends(owner_of)]


async def read_form(request: Request) -> FormData:
    """The form of a request with one file. Close the form or the request afterwards.

    Raises:
        BadRequest: it is no form, or has too much in it.
        Disconnected: the client left while it sent the file.
    """
    try:
        return await request.form(max_files=1, max_fields=8, max_part_size=MOST_FIELD)
    except ClientDisconnect:
        raise Disconnected("the client left while it sent its file") from None
    except HTTPException as error:
        raise BadRequest(f"the form cannot be read: {error.detail}") from None


def find_file(view: View, owner: str, id: str, purpose: str) -> ClientFile:
    """A file that a caller has sent for this purpose. Raises NotFound and BadRequest."""
    file = view.services.files.find(owner, id)
    if file.purpose != purpose:
        raise BadRequest(f"{file.id} has the purpose {file.purpose}: expected a file of the purpose {purpose}")
    return file


async def keep(view: View, owner: str, sent: UploadFile, purpose: str) -> ClientFile:
    """Store a file of a form. Raises BadRequest, or DataError for a table whose name is not that of one."""
    name = sent.filename or ""
    if "\0" in name:
        raise BadRequest("the name of the file has a NUL character: give another name")
    if purpose == TABLE:
        require_table_name(name)
    return await view.control(_add, view, owner, sent, purpose)


def _add(view: View, owner: str, sent: UploadFile, purpose: str) -> ClientFile:
    with tempfile.TemporaryDirectory(prefix="turret-file-") as folder:
        path = Path(folder) / "sent"
        with path.open("wb") as write:
            shutil.copyfileobj(sent.file, write, PIECE)
        return view.services.files.add(owner, printable(sent.filename or "file")[:255], purpose, path)
