"""Requests that a proxy and this server could read in two ways are refused before anything else looks at them.

Where a body ends must be said once: with Content-Length beside Transfer-Encoding a proxy may take the one and a server
the other, and what one of them reads as a body is the other's next request (RFC 9112, section 6.3). Who asks must be
said once, too: of two Authorization headers a proxy may have checked the first and a server the last.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from turret.errors import BadRequest
from turret.server.error_responses import answer


class Unambiguous:
    """An ASGI application whose requests can be read in one way only; others are 400, and their connection closes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = ambiguity(scope) if scope["type"] == "http" else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await answer(BadRequest(problem), scope, receive, send, close=True)


def ambiguity(scope: Scope) -> str | None:
    """What can be read in two ways."""
    names = [name.lower() for name, _ in scope["headers"]]
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            return "the request has both Content-Length and Transfer-Encoding: send one of them"
        if scope["http_version"] == "1.0":
            return "the request is HTTP/1.0 and has Transfer-Encoding: send Content-Length"
    if names.count(b"authorization") > 1:
        return "the request has two Authorization headers: send one"
    return None
