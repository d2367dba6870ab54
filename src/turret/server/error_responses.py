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
from turret.json_types import JsonObject, Plain, mapping_of

# The row of the nearest base class applies.
_BY_STATUS: tuple[tuple[int, tuple[type[BaseException], ...]], ...] = (
    (400, (errors.BadRequest, errors.BadArgument, errors.RecipeError, errors.BadExperiment)),
    (400, (errors.DataError, errors.NoRoom)),  # the data of a request
    (401, (errors.Unauthorized,)),
    (403, (errors.Forbidden,)),
    (404, (errors.NotFound, errors.BadReference)),  # nothing can have a bad name
    (408, (errors.TooSlow,)),
    (409, (errors.AdapterError, errors.BundleError, errors.InUse, errors.ExperimentError, errors.GateFailed)),
    (413, (errors.TooLarge,)),
    (415, (errors.WrongMediaType,)),
    (429, (errors.QuotaSpent, errors.Busy, errors.QueueFull)),
    (431, (errors.HeadersTooLarge,)),
    (499, (errors.Disconnected,)),  # nobody reads it: for the log
    (500, (errors.Corrupt, errors.NotFinite, TurretError, Exception)),
    (503, (errors.Cancelled, errors.Draining, errors.StoreError)),
    (504, (errors.DeadlineExceeded,)),
)
STATUSES = {kind: status for status, kinds in _BY_STATUS for kind in kinds}
_SAID: dict[type[BaseException], str] = {  # replaces the error's own text
    errors.BundleError: "this version cannot be read: the server's log says why; verify it",
    errors.StoreError: "the store cannot be read or written now: the server's log says why",
    errors.Corrupt: "the stored bytes of this version are damaged: verify it, and store it again",
    TurretError: "the request failed: the server's log says why",
    Exception: "this is a bug in turret: the server's log has the request's id",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
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
    kind = next(each for each in type(error).__mro__ if each in STATUSES)
    message = _SAID.get(kind) or without_paths(str(error))
    return _response(STATUSES[kind], message, code_of(error), retry_after=getattr(error, "retry_after", None))


def status_response(status: int, message: str) -> ErrorResponse:
    """The response to an error of the router or of FastAPI."""
    code = CODES.get(status, "bad_request" if status < 500 else "internal_error")
    return _response(status, message, code)


class Problem(TypedDict, total=False):
    """A problem of a request, as Pydantic tells it."""

    type: str
    loc: tuple[int | str, ...]
    msg: str


def validation_response(problems: Sequence[Problem], sent: Plain = None) -> ErrorResponse:
    """The response to a request that does not fit its schema.

    It says where and what was expected, and never repeats a value of the request.

    Args:
        problems: Pydantic's.
        sent: the body, whose keys tell a place in it from the name of a member of a union.
    """
    # If a value fits no member of a union, the problem of the member with the right type says more.
    default: Problem = problems[0] if problems else {}
    first = next((each for each in problems if not str(each.get("type")).endswith("_type")), default)
    source, *rest = first.get("loc") or ("",)
    place = rest if source in ("", "body", "query", "path") else [source, *rest]
    if source == "body" and sent is not None:
        place = list(_sent_place(place, sent, missing=first.get("type") == "missing"))
    where = [str(part)[:60] for part in place if isinstance(part, int) or _KEY.fullmatch(part)]
    text = "unknown key" if first.get("type") == "extra_forbidden" else str(first.get("msg", "cannot be read"))
    message = f"{'.'.join(where[:4])}: {text}" if where else text
    return _response(400, message, "bad_request", where[0] if where else None)


def _sent_place(place: Sequence[int | str], sent: Plain, *, missing: bool) -> Iterator[int | str]:
    """The keys and numbers of a place that the body has, and the last one if it is missing there."""
    for number, part in enumerate(place):
        inner: dict[int | str, Plain] = dict(enumerate(sent) if isinstance(sent, list) else mapping_of(sent).items())
        if part in inner:
            yield part
            sent = inner[part]
        elif missing and number == len(place) - 1:
            yield part


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
    status: int, message: str, code: str, param: str | None = None, retry_after: float | None = None
) -> ErrorResponse:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"content-type": "application/json"}
    if status in RETRY_AFTER:
        headers["retry-after"] = str(max(1, math.ceil(retry_after or RETRY_AFTER[status])))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return ErrorResponse(status, body, headers)
