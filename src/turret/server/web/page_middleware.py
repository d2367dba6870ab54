"""What every page has, whoever answered: strict headers, errors as a line in a page, the way to the sign-in.

It stands before the guard and the limits, so that what they refuse is a page too. Refuses to know routes.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turret.server.paths import is_page
from turret.server.web import render

CONTENT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer a browser would not say where a form comes from
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class PageMiddleware:
    """An ASGI application whose pages are pages in every case."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_page(scope["path"]):
            await self.app(scope, receive, _Answer(scope, send))
        else:
            await self.app(scope, receive, send)


class _Answer:
    """One answer on its way out; an error in JSON is held until its body is there."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._held: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400 and _kind(message) == b"application/json":
                self._held = message
                return
            message = _with(message, HEADERS)
        elif self._held is not None:
            start, body = _page(self._scope, self._held, message.get("body", b""))
            self._held = None
            await self._send(start)
            message = {**message, "body": body}
        await self._send(message)


def _page(scope: Scope, held: Message, body: bytes) -> tuple[Message, bytes]:
    """The error as a page, or as the line that htmx puts into one; nobody signed in: the way there."""
    status, error = held["status"], _error(body)
    asker = scope.get("state", {}).get("asker")
    live = any(name.lower() == b"hx-request" for name, _ in scope["headers"])
    headers: dict[str, str] = {}
    if status == 401:
        where = f"/sign-in?next={quote(_wanted(scope), safe='')}"
        headers = {"hx-redirect": where} if live else {"location": where}
        status = status if live else 303
    shown = {"status": status, "message": error.get("message", "the server could not do it"), "asker": asker}
    text = render.template("problem.html.j2" if live else "error.html.j2").render(shown).encode()
    kept = [each for each in held["headers"] if each[0].lower() in (b"retry-after", b"connection", b"allow")]
    raw = {**headers, "content-type": "text/html; charset=utf-8", "content-length": str(len(text))}
    return _with({**held, "status": status, "headers": kept}, {**HEADERS, **raw}), text


def _wanted(scope: Scope) -> str:
    """Where to go on after signing in: the page that was asked for, where it was only asked for."""
    path, query = scope["path"], scope.get("query_string", b"").decode("latin-1")
    return (f"{path}?{query}" if query else str(path)) if scope["method"] == "GET" else "/"


def _error(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(message: Message) -> bytes:
    kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return bytes(kinds[0]).partition(b";")[0] if kinds else b""


def _with(message: Message, headers: dict[str, str]) -> Message:
    """With these headers where it has none of that name."""
    there = {name.lower() for name, _ in message.get("headers", ())}
    more = [(name.encode(), value.encode()) for name, value in headers.items() if name.encode() not in there]
    return {**message, "headers": [*message.get("headers", ()), *more]}
