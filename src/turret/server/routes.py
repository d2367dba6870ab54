"""What all routes share: the server as its caller sees it, units, strict JSON bodies, schemas of errors.

Also asks a route in this process, for batches and for pages.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Protocol, Required, TypeAlias, TypedDict

from fastapi import APIRouter, Depends, Header, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.access import OPERATOR
from turret.errors import TooLarge
from turret.json_types import JsonObject, JsonValue, Plain
from turret.server import services
from turret.server.auth import Caller
from turret.server.limits import MOST_UNIT, RequestLimits, replayed
from turret.server.schemas import Error

# --- bodies -----------------------------------------------------------------------------------------------------------
# Read a JSON body as the model of a route, in bounded time.
#
# Parsing and validation take time by the number of keys and values, not by the number of bytes, and both hold Python's
# global lock. So keys and values are counted before a body is parsed, and a large body is then read on a thread.


INLINE = 64 << 10  # bytes; a larger body is read on a thread
Body: TypeAlias = BaseModel | Sequence[BaseModel]  # what a route receives


class Field(Protocol):
    """FastAPI's field of the body of a route."""

    def validate(
        self, value: Plain, values: dict[str, Plain], *, loc: tuple[int | str, ...] = ()
    ) -> tuple[Body, list[JsonObject]]: ...


def read(content: bytes, field: Field, limits: RequestLimits) -> Body:
    """The body as the model of its route. Raises TooLarge, HTTPException (not JSON) and RequestValidationError."""
    check_counts(content, limits)
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    body, errors = field.validate(value, {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return body


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
            raise TooLarge(f"the body has more than {limit} {name}: send the inputs in several requests")


def _keys(text: bytes) -> int:
    return text.count(b":")


def _values(text: bytes) -> int:
    """Every value but the first follows a comma, or is the first one in a list or an object."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _outside_strings(content: bytes, limit: int) -> bytes:
    """The body without its strings. limit: of strings, checked before the body is split at them."""
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 2 * limit:
        raise TooLarge(f"the body has more than {limit} strings: send the inputs in several requests")
    return b"".join(plain.split(b'"')[::2])


# --- routes -----------------------------------------------------------------------------------------------------------


_BEARER = HTTPBearer(auto_error=False, description="A token of `turret token create`.")
ERRORS: dict[int | str, dict[str, type[Error] | str]] = {
    "4XX": {"model": Error, "description": "What was wrong with the request, in OpenAI's format."},
    "5XX": {"model": Error, "description": "Why the server could not answer, in OpenAI's format."},
}


def _view(request: Request) -> services.View:
    """The server as the caller sees it. This is the one place where a route gets it from."""
    server: services.Services = request.app.state.services
    caller = getattr(request.state, "caller", None)
    return server.view(OPERATOR if caller is None else caller.access)


View: TypeAlias = Annotated[services.View, Depends(_view)]
_UNIT = "The unit of an experiment, such as a user's id. Overrides the body's `user`."


def _unit(turret_unit: Annotated[str | None, Header(max_length=MOST_UNIT, description=_UNIT)] = None) -> str | None:
    """The header as UTF-8; if it is not UTF-8, as Latin-1. None if it is missing or empty."""
    if not turret_unit:
        return None
    try:
        return turret_unit.encode("latin-1").decode()
    except UnicodeDecodeError:
        return turret_unit


Unit = Annotated[str | None, Depends(_unit)]


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
                    parsed.body_value = read(content, field, view.services.limits)
                else:
                    parsed.body_value = await view.parsing(read, content, field, view.services.limits)
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
    await app(scope, replayed(body, receive), send)


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
