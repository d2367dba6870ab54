"""Refuse requests that a proxy and this server could read in two ways.

With Content-Length and Transfer-Encoding in one request, a proxy may use one and the server the other. What one of them
takes for the body is then the next request of the other (request smuggling, RFC 9112, section 6.3). With two
Authorization headers, a proxy may have checked the first one and the server would use the last one.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from turret.errors import BadRequest
from turret.server.error_responses import send_error


class HeaderMiddleware:
    """Answers an ambiguous request with 400 and closes its connection."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = ambiguity(scope) if scope["type"] == "http" else None
        if message is None:
            await self.app(scope, receive, send)
        else:
            await send_error(BadRequest(message), scope, receive, send, close=True)


def ambiguity(scope: Scope) -> str | None:
    """Why the request can be read in two ways; None if it cannot."""
    names = [name.lower() for name, _ in scope["headers"]]
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            return "the request has both Content-Length and Transfer-Encoding: send one of them"
        if scope["http_version"] == "1.0":
            return "the request is HTTP/1.0 and has Transfer-Encoding: send Content-Length"
    if names.count(b"authorization") > 1:
        return "the request has two Authorization headers: send one"
    return None
