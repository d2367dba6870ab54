"""Refuse requests that a proxy and this server could read in two ways.

With Content-Length and Transfer-Encoding in one request, a proxy may use one and the server the other. What one of them
takes for the body is then the next request of the other (request smuggling, RFC 9112, section 6.3). With two
Authorization headers, a proxy may have checked the first one and the server would use the last one; two Cookie headers
are refused for the same reason. `check_head` refuses lines that only some servers read as one, before they are parsed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from turret.errors import BadRequest, HeadersTooLarge, RequestError, ServeRefused
from turret.server.error_responses import send_error
from turret.server.limits import is_page

# --- cross origin -----------------------------------------------------------------------------------------------------
# Pages of other sites that may call the API from a browser (CORS). The console's pages stay closed to them.


ANY = "*"
REMEMBERED = 600  # seconds for which a browser need not ask again
READ = (
    "turret-receipt",
    "turret-adapter",
    "turret-version",
    "turret-digest",
    "turret-base",
    "turret-experiment",
    "turret-arm",
    "turret-probability",
    "x-request-id",
    "retry-after",
)
_ORIGIN = re.compile(r"https?://(?:[\w.-]+|\[[0-9a-fA-F:]+\])(?::\d{1,5})?")


def origins(texts: Sequence[str]) -> tuple[str, ...]:
    """Checked origins. Raises ServeRefused for anything that is no origin."""
    for text in texts:
        if text != ANY and not _ORIGIN.fullmatch(text):
            raise ServeRefused(
                f"--cors-origin {ascii(text)[:60]}: expected a scheme, a host and perhaps a port, such as "
                "https://app.example, or * for any"
            )
    return tuple(texts)


def allow_origins(app: ASGIApp, allowed: Sequence[str]) -> ASGIApp:
    """The application, whose API pages of these origins may call. A browser's question before a call needs no token."""
    return _CrossOrigin(app, allowed) if allowed else app


class _CrossOrigin:
    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.app = app
        self.api = CORSMiddleware(
            app,
            allow_origins=list(allowed),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=list(READ),
            max_age=REMEMBERED,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = scope["type"] != "http" or is_page(scope["path"])
        await (self.app if page else self.api)(scope, receive, send)


# --- headers ----------------------------------------------------------------------------------------------------------


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
    for name in (b"authorization", b"cookie"):
        if names.count(name) > 1:
            return f"the request has two {name.decode().title()} headers: send one"
    return None


_END = b"\r\n\r\n"
_REFUSED = {  # a CR at the end may get its LF with the next bytes
    re.compile(rb"(?<!\r)\n|\r(?=[^\n])"): "a line of the headers does not end in CR LF: end each so",
    re.compile(rb"\n[ \t]"): "a header continues on a second line (folded): send each header on one line",
    re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"): "the headers have a control character: leave it out",
}


def check_head(received: bytes, most: int) -> RequestError | None:
    """What is wrong with the first line and the headers of a request, as far as they were received; None if nothing is.

    Parsers read a line that ends in LF alone, and a folded one, in different ways. They also take quadratic time for
    blanks before a control character.

    Args:
        most: Bytes of the first line and the headers together.
    """
    end = received.find(_END)
    head = received if end < 0 else received[: end + len(_END)]
    if len(head) > most:
        return HeadersTooLarge(f"the headers have more than {most} bytes: send fewer or shorter ones")
    return next((BadRequest(message) for found, message in _REFUSED.items() if found.search(head)), None)
