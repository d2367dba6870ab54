"""One table from errors to answers, in the shape that OpenAI's clients read. Refuses to know which route was asked.

    {"error": {"message": "...", "type": "...", "param": null, "code": "not_found"}}

`code` is the error's class in small letters: a client finds the class by it. What may name a file of the server is
told in the table's words, not in the error's; a bug is told in none.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from turret import errors
from turret.errors import TurretError


@dataclass(frozen=True)
class Rule:
    """How one class of errors is answered."""

    status: int
    type: str
    said: str | None = None  # in place of the error's own words


_INVALID, _SERVER, _LIMIT = "invalid_request_error", "server_error", "rate_limit_error"
_STORE = "the store cannot be read or written now: the server's log says why"

# The nearest class in an error's own line of classes decides.
TABLE: dict[type[BaseException], Rule] = {
    errors.BadRequest: Rule(400, _INVALID),
    errors.BadReference: Rule(404, _INVALID),  # nothing can be called so
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
    errors.QuotaSpent: Rule(429, _LIMIT),
    errors.Busy: Rule(429, _LIMIT),
    errors.Cancelled: Rule(503, _SERVER),
    errors.Draining: Rule(503, _SERVER),
    errors.StoreError: Rule(503, _SERVER, _STORE),
    errors.Corrupt: Rule(500, _SERVER, "the stored bytes of this version are damaged: verify it, and store it again"),
    errors.NotFinite: Rule(500, _SERVER),
    errors.DeadlineExceeded: Rule(504, _SERVER),
    TurretError: Rule(500, _SERVER, "the server could not do it: its log says why"),
    Exception: Rule(500, _SERVER, "this is a bug in turret: the server's log has the request's id"),
}
STATUSES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed"}  # of what the router says by itself
RETRY_AFTER = {429: 1.0, 503: 5.0}  # seconds, where the error says none

_KEY = re.compile(r"(?!(?:str|int|float|bool|dict|list|none)$)[A-Za-z_][A-Za-z0-9_]*", re.ASCII)  # no form of a union
_PATH = re.compile(r"(?<![\w.:/])(?!/v1/|/api/)(?:[A-Za-z]:\\|/)[^\s'\"(),;]+")


@dataclass(frozen=True)
class ErrorResponse:
    """An answer that is an error."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]

    def encoded(self) -> bytes:
        return json.dumps(self.body, ensure_ascii=False).encode("utf-8", "replace")


def code_of(error: BaseException) -> str:
    """`NotFound` -> `not_found`."""
    name = type(error).__name__ if isinstance(error, TurretError) else "InternalError"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def problem(error: BaseException, param: str | None = None) -> ErrorResponse:
    """What is answered for the error."""
    rule = next(TABLE[each] for each in type(error).__mro__ if each in TABLE)
    return shaped(
        rule.status,
        rule.said or without_paths(str(error)),
        rule.type,
        code_of(error),
        param,
        getattr(error, "retry_after", None),
    )


def shaped(
    status: int, message: str, kind: str, code: str, param: str | None = None, retry_after: float | None = None
) -> ErrorResponse:
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {"content-type": "application/json"}
    if status in RETRY_AFTER:
        headers["retry-after"] = str(max(1, math.ceil(retry_after or RETRY_AFTER[status])))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return ErrorResponse(status, body, headers)


def by_status(status: int, message: str) -> ErrorResponse:
    """For what the router or the framework refuses by itself."""
    code = STATUSES.get(status, "bad_request" if status < 500 else "internal_error")
    return shaped(status, message, _INVALID if status < 500 else _SERVER, code)


def invalid(found: Sequence[Any]) -> ErrorResponse:
    """For a request that does not fit its schema: where, and what was expected; never what was sent."""
    # Of a value that fits none of several forms, what is wrong with the form that it has says more than its type.
    first = next((each for each in found if not str(each.get("type")).endswith("_type")), found[0] if found else {})
    place = [str(part)[:60] for part in first.get("loc", ()) if isinstance(part, int) or _KEY.fullmatch(part)]
    where = place[1:] if place[:1] in (["body"], ["query"], ["path"]) else place
    said = "unknown key" if first.get("type") == "extra_forbidden" else str(first.get("msg", "cannot be read"))
    message = f"{'.'.join(where[:4])}: {said}" if where else said
    return shaped(400, message, _INVALID, "bad_request", where[0] if where else None)


def without_paths(text: str) -> str:
    """The text on one line, with whatever looks like a file of the server taken out."""
    return " ".join(_PATH.sub("(a file)", text).split())


async def answer(
    error: TurretError, scope: Scope, receive: Receive, send: Send, *, close: bool = False, linger: float = 0.0
) -> None:
    """Send the error's answer. linger: seconds to read off what the client still sends, so that it comes to listen."""
    told = problem(error)
    body = told.encoded()
    headers = {**told.headers, "content-length": str(len(body))}
    if close or linger:
        headers["connection"] = "close"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": told.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": bool(linger)})
    if linger:
        with suppress(TimeoutError):
            async with asyncio.timeout(linger):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
