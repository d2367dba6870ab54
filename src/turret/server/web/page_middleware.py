"""Strict headers for every page, and errors as pages. Without a session, the response leads to the sign-in.

It stands before the guard and the limits, so that their errors become pages too.
"""

from __future__ import annotations

import json
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.json_types import JsonMapping
from turret.server.limits import is_page
from turret.server.web import render

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer a browser sends no origin with a form
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class PageMiddleware:
    """Passes the responses of pages through `_PageResponse`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_page(scope["path"]):
            await self.app(scope, receive, _PageResponse(scope, send))
        else:
            await self.app(scope, receive, send)


class _PageResponse:
    """Sends one response. The start of a JSON error waits for its body, and both become a page."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._error_start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400 and _media_type(message) == b"application/json":
                self._error_start = message
                return
            message = _with_headers(message, HEADERS)
        elif self._error_start is not None:
            start, body = _error_page(self._scope, self._error_start, message.get("body", b""))
            self._error_start = None
            await self._send(start)
            message = {**message, "body": body}
        await self._send(message)


def _error_page(scope: Scope, start: Message, body: bytes) -> tuple[Message, bytes]:
    """An error as a page, or as the line that htmx puts into a page. 401 leads to the sign-in."""
    status, error = start["status"], _error(body)
    caller = scope.get("state", {}).get("caller")
    htmx = any(name.lower() == b"hx-request" for name, _ in scope["headers"])
    headers: dict[str, str] = {}
    if status == 401:
        url = f"/sign-in?next={quote(_requested(scope), safe='')}"
        headers = {"hx-redirect": url} if htmx else {"location": url}
        status = status if htmx else 303
    values = {"status": status, "message": error.get("message", "the request failed"), "caller": caller}
    text = render.template("problem.html.j2" if htmx else "error.html.j2").render(values).encode()
    own = [each for each in start["headers"] if each[0].lower() in (b"retry-after", b"connection", b"allow")]
    more = {**headers, "content-type": "text/html; charset=utf-8", "content-length": str(len(text))}
    return _with_headers({**start, "status": status, "headers": own}, {**HEADERS, **more}), text


def _requested(scope: Scope) -> str:
    """The page to open after signing in."""
    path, query = scope["path"], scope.get("query_string", b"").decode("latin-1")
    return (f"{path}?{query}" if query else str(path)) if scope["method"] == "GET" else "/"


def _error(body: bytes) -> JsonMapping:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _media_type(message: Message) -> bytes:
    types = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return bytes(types[0]).partition(b";")[0] if types else b""


def _with_headers(message: Message, headers: dict[str, str]) -> Message:
    """The message with these headers, except those that it has already."""
    names = {name.lower() for name, _ in message.get("headers", ())}
    more = [(name.encode(), value.encode()) for name, value in headers.items() if name.encode() not in names]
    return {**message, "headers": [*message.get("headers", ()), *more]}
