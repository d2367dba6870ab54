"""Who may ask what: bearer tokens with scopes, looked at before anything of a body is read.

`Guard` is the policy: it knows tokens, scopes and whether the door stands open. It stands open only on loopback, and
only until the store has had a token; what was guarded once stays so until the server ends. The API takes tokens, pages
take the session that a token began; a page of another site may write to neither. `Guarded` is the door.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from turret.errors import Forbidden, ServeRefused, TurretError, Unauthorized
from turret.server.error_responses import answer
from turret.server.limits import OPEN
from turret.server.paths import INFER_PAGES, UNSIGNED, first, is_page
from turret.server.quotas import Quota
from turret.server.sessions import Sessions, session_of
from turret.store import AccessToken, acting
from turret.store.access_tokens import SCOPES, which

LONGEST = 256  # characters of a token
READS = ("GET", "HEAD", "OPTIONS")
INFER = "/v1/"  # paths that the scope infer opens; any other path needs admin, one that is not there too
# Paths that any token opens. Who may ask may also say what came of the answer.
ANY = ("/api/outcomes", "/openapi.json")


@dataclass(frozen=True)
class Asker:
    """Who sent a request."""

    name: str | None  # of the token; None where the door stands open
    quota: Quota = field(default_factory=Quota)
    scopes: tuple[str, ...] = ()
    session: str | None = None  # of a page

    @property
    def key(self) -> str:
        return f"token {self.name}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """The tokens as they were read last, and what they open."""

    def __init__(self, host: str, tokens: Sequence[AccessToken], clock: Callable[[], float] = time.monotonic) -> None:
        self.sessions = Sessions(clock)
        self._tokens: Sequence[AccessToken] = ()
        self._open = True
        self.know(tokens)
        if self._open and not is_loopback(host):
            raise ServeRefused(
                f"serve on {host} without tokens: expected a loopback address such as 127.0.0.1, "
                "or a token: make one with `turret token create NAME`"
            )

    @property
    def open(self) -> bool:
        return self._open

    def know(self, tokens: Sequence[AccessToken]) -> None:
        """Take the newest list. A store that has had a token, even one revoked since, keeps the door closed."""
        self._tokens = [token for token in tokens if token.revoked is None]
        self._open = self._open and not tokens

    def admit(self, path: str, authorization: str | None, host: str | None) -> Asker:
        """Of the API; raises Unauthorized or Forbidden."""
        if self._open:
            return self._anyone(host)
        token = self._token(authorization)
        wanted = "infer" if path.startswith(INFER) else "admin"
        if path not in ANY and wanted not in token.scopes:
            raise Forbidden(f"token {token.name!r} has no scope {wanted}: use one that has")
        return _asker(token)

    def visit(self, path: str, session: str | None, host: str | None) -> Asker:
        """Of a page; raises Unauthorized or Forbidden."""
        if self._open:
            return self._anyone(host)
        known = self.sessions.whose(session)
        token = next((each for each in self._tokens if each.hash == known), None)
        if token is None and first(path) not in UNSIGNED:
            raise Unauthorized("nobody is signed in here: sign in with a token of `turret token create`")
        if token is None:
            return Asker(None)
        if "admin" not in token.scopes and first(path) not in INFER_PAGES | UNSIGNED:
            raise Forbidden(f"token {token.name!r} has no scope admin: it opens the playground")
        return _asker(token, session)

    def enter(self, secret: str) -> str:
        """Begin a session for whoever has this token; raises Unauthorized."""
        return self.sessions.begin(self._token(f"Bearer {secret}").hash)

    def _anyone(self, host: str | None) -> Asker:
        if host is not None and not is_loopback(_without_port(host)):
            raise Forbidden("a server without tokens answers to loopback names only: ask 127.0.0.1, or make tokens")
        return Asker(None, scopes=SCOPES)

    def _token(self, authorization: str | None) -> AccessToken:
        if authorization is None:
            raise Unauthorized("no token: expected the header Authorization: Bearer TOKEN")
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer" or not secret.strip() or len(secret) > LONGEST:
            raise Unauthorized("the authorization cannot be read: expected Bearer TOKEN")
        token = which(self._tokens, secret.strip())
        if token is None:
            raise Unauthorized("the token is not known, or was revoked: make one with `turret token create NAME`")
        return token


def _asker(token: AccessToken, session: str | None = None) -> Asker:
    return Asker(token.name, Quota(token.requests_per_minute, token.tokens_per_minute), token.scopes, session)


def check_origin(method: str, headers: Mapping[bytes, str], *, page: bool) -> None:
    """Raises Forbidden for a write that a page of another site sends. Browsers say where a write comes from; a program
    says nothing, which is enough for the API and not for a form."""
    if method in READS:
        return
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        ours = site == "same-origin" or (site == "none" and not page)
    elif origin is not None:
        ours = origin.partition("://")[2] == (headers.get(b"host") or "-")
    else:
        ours = not page
    if not ours:
        raise Forbidden("this was sent by a page of another site, and nothing was done: use the server's own pages")


def _without_port(host: str) -> str:
    """`127.0.0.1:8000` -> `127.0.0.1`, `[::1]:8000` -> `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


class Guarded:
    """An ASGI application behind the guard; who asks is `request.state.asker`."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self.app = app
        self.guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            asker = self._asker(scope["path"], scope["method"], headers)
        except TurretError as error:
            await answer(error, scope, receive, send, close=True)
            return
        scope.setdefault("state", {})["asker"] = asker
        with acting(None if asker.name is None else asker.key):
            await self.app(scope, receive, send)

    def _asker(self, path: str, method: str, headers: Mapping[bytes, str]) -> Asker:
        page, host = is_page(path), headers.get(b"host")
        if page or self.guard.open:
            check_origin(method, headers, page=page)
        if page:
            return self.guard.visit(path, session_of(headers.get(b"cookie")), host)
        return self.guard.admit(path, headers.get(b"authorization"), host)
