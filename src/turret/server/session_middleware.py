"""Looks up a session that another server of the store opened, before `turret.server.auth` asks for it."""

from __future__ import annotations

from contextlib import suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from turret.errors import TurretError
from turret.server.connections import client_of
from turret.server.paths import is_page
from turret.server.sessions import session_of
from turret.server.state import ServerState


class SessionMiddleware:
    """Asks the catalog, on a thread, for the session of a page that this server has not seen."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_page(scope["path"]):
            cookies = next((value for name, value in scope["headers"] if name.lower() == b"cookie"), b"")
            session = session_of(cookies.decode("latin-1"))
            if session is not None and self.state.guard.sessions.is_strange(session):
                look_up = self.state.replica.signing.of(client_of(scope.get("client")) or "")
                with suppress(TurretError):  # then the session is unknown here
                    await look_up(self.state.guard.sessions.look_up, session)
        await self.app(scope, receive, send)
