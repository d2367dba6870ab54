"""The table from errors to HTTP responses, in the format of OpenAI's API.

    {"error": {"message": "...", "type": "...", "param": null, "code": "not_found"}}

`code` is the class of the error in snake case; the client raises that class again. A message never names a file of the
server: if an error's own text may do so, the table has a text for it.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypedDict

from starlette.types import Receive, Scope, Send

from turret import errors
from turret.errors import TurretError
from turret.json_types import JsonObject


@dataclass(frozen=True)
class Rule:
    """The response to one class of errors. message: replaces the error's own text."""

    status: int
    type: str
    message: str | None = None


_INVALID, _SERVER, _LIMIT = "invalid_request_error", "server_error", "rate_limit_error"
_STORE = "the store cannot be read or written now: the server's log says why"

# The rule of the nearest base class applies.
TABLE: dict[type[BaseException], Rule] = {
    errors.BadRequest: Rule(400, _INVALID),
    errors.BadReference: Rule(404, _INVALID),  # nothing can have such a name
    errors.BadArgument: Rule(400, _INVALID),
    errors.RecipeError: Rule(400, _INVALID),
    errors.DataError: Rule(400, _INVALID),
    errors.NoRoom: Rule(400, _INVALID),
    errors.Unauthorized: Rule(401, "authentication_error"),
    errors.Forbidden: Rule(403, "permission_error"),
    errors.NotFound: Rule(404, _INVALID),
    errors.TooSlow: Rule(408, _INVALID),
    errors.AdapterError: Rule(409, _INVALID),
    errors.BundleError: Rule(409, _INVALID, "this version cannot be read: the server's log says why; verify it"),
    errors.InUse: Rule(409, _INVALID),
    errors.ExperimentError: Rule(409, _INVALID),
    errors.BadExperiment: Rule(400, _INVALID),
    errors.GateFailed: Rule(409, _INVALID),
    errors.TooLarge: Rule(413, _INVALID),
    errors.WrongMediaType: Rule(415, _INVALID),
    errors.HeadersTooLarge: Rule(431, _INVALID),
    errors.QuotaSpent: Rule(429, _LIMIT),
    errors.Busy: Rule(429, _LIMIT),
    errors.QueueFull: Rule(429, _LIMIT),
    errors.Cancelled: Rule(503, _SERVER),
    errors.Disconnected: Rule(499, _INVALID),  # nobody reads it: for the log
    errors.Draining: Rule(503, _SERVER),
    errors.StoreError: Rule(503, _SERVER, _STORE),
    errors.Corrupt: Rule(500, _SERVER, "the stored bytes of this version are damaged: verify it, and store it again"),
    errors.NotFinite: Rule(500, _SERVER),
    errors.DeadlineExceeded: Rule(504, _SERVER),
    TurretError: Rule(500, _SERVER, "the request failed: the server's log says why"),
    Exception: Rule(500, _SERVER, "this is a bug in turret: the server's log has the request's id"),
}
CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed"}  # of FastAPI's own errors
RETRY_AFTER = {429: 1.0, 503: 5.0}  # seconds, if the error does not say

_KEY = re.compile(r"(?!(?:str|int|float|bool|dict|list|none)$)[A-Za-z_][A-Za-z0-9_]*", re.ASCII)  # no member of a union
_PATH = re.compile(r"(?<![\w.:/])(?!/v1/|/api/)(?:[A-Za-z]:\\|/)[^\s'\"(),;]+")


@dataclass(frozen=True)
class ErrorResponse:
    """The response to a request that failed."""

    status: int
    body: JsonObject
    headers: dict[str, str]

    def encode_body(self) -> bytes:
        return json.dumps(self.body, ensure_ascii=False).encode("utf-8", "replace")


def code_of(error: BaseException) -> str:
    """`NotFound` -> `not_found`."""
    name = type(error).__name__ if isinstance(error, TurretError) else "InternalError"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def error_response(error: BaseException) -> ErrorResponse:
    """The response to an error."""
    rule = next(TABLE[each] for each in type(error).__mro__ if each in TABLE)
    return _response(
        rule.status,
        rule.message or without_paths(str(error)),
        rule.type,
        code_of(error),
        retry_after=getattr(error, "retry_after", None),
    )


def status_response(status: int, message: str) -> ErrorResponse:
    """The response to an error of the router or of FastAPI."""
    code = CODES.get(status, "bad_request" if status < 500 else "internal_error")
    return _response(status, message, _INVALID if status < 500 else _SERVER, code)


class Problem(TypedDict, total=False):
    """A problem of a request, as Pydantic tells it."""

    type: str
    loc: tuple[int | str, ...]
    msg: str


def validation_response(problems: Sequence[Problem]) -> ErrorResponse:
    """The response to a request that does not fit its schema.

    It says where and what was expected, and never repeats a value of the request. problems: Pydantic's.
    """
    # If a value fits no member of a union, the problem of the member with the right type says more.
    default: Problem = problems[0] if problems else {}
    first = next((each for each in problems if not str(each.get("type")).endswith("_type")), default)
    path = [str(part)[:60] for part in first.get("loc", ()) if isinstance(part, int) or _KEY.fullmatch(part)]
    where = path[1:] if path[:1] in (["body"], ["query"], ["path"]) else path
    text = "unknown key" if first.get("type") == "extra_forbidden" else str(first.get("msg", "cannot be read"))
    message = f"{'.'.join(where[:4])}: {text}" if where else text
    return _response(400, message, _INVALID, "bad_request", where[0] if where else None)


@contextmanager
def as_bad_request() -> Iterator[None]:
    """A bad name, pattern, gate or time is a mistake in the request, not a model that is missing."""
    try:
        yield
    except errors.BadReference as error:
        raise errors.BadRequest(str(error)) from None


def without_paths(text: str) -> str:
    """The text on one line, with every path of a file replaced."""
    return " ".join(_PATH.sub("(a file)", text).split())


async def send_error(
    error: Exception, scope: Scope, receive: Receive, send: Send, *, close: bool = False, linger: float = 0.0
) -> None:
    """Send the response to an error.

    Args:
        close: Whether to close the connection.
        linger: Seconds for which the rest of the request is read and dropped before the connection closes, so that the
            client gets to read the response.
    """
    response = error_response(error)
    body = response.encode_body()
    headers = {**response.headers, "content-length": str(len(body))}
    if close or linger:
        headers["connection"] = "close"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": response.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": bool(linger)})
    if linger:
        with suppress(TimeoutError):
            async with asyncio.timeout(linger):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _response(
    status: int, message: str, kind: str, code: str, param: str | None = None, retry_after: float | None = None
) -> ErrorResponse:
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"content-type": "application/json"}
    if status in RETRY_AFTER:
        headers["retry-after"] = str(max(1, math.ceil(retry_after or RETRY_AFTER[status])))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return ErrorResponse(status, body, headers)
