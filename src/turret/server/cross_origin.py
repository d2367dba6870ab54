"""Pages of other sites that may call the API from a browser (CORS). The console's pages stay closed to them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from turret.errors import ServeRefused
from turret.server.paths import is_page

ANY = "*"
REMEMBERED = 600  # seconds for which a browser need not ask again
READ = ("turret-receipt", "turret-adapter", "turret-version", "turret-digest", "turret-base", "turret-experiment",
        "turret-arm", "turret-probability", "x-request-id", "retry-after")  # fmt: skip
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
