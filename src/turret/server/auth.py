"""Bearer tokens with scopes, checked before anything of a body is read, and sessions of the console.

`Guard` is the policy. A server is open, that is, it needs no token, only on loopback and only while its store has never
had a token; once closed it stays closed. The API takes tokens, pages take the session that a token opened.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from turret.access import DEFAULT, NOBODY, OPERATOR, Access, acting
from turret.errors import BadRequest, Forbidden, ServeRefused, StoreError, TurretError, Unauthorized
from turret.server.error_responses import send_error
from turret.server.limits import INFER_PAGES, OPEN, UNSIGNED, Quota, client_of, first_segment, is_page
from turret.store import AccessToken
from turret.store.access_tokens import FORMS, SCOPES, SIGN_INS, SessionRows, hash_secret, token_with_secret
from turret.store.catalog import now

# --- sessions ---------------------------------------------------------------------------------------------------------
# Sessions of the console, and the form token that each form of a session carries.
#
# The browser keeps 256 random bits as a cookie. The server keeps only the hash of them, with the hash of the access
# token that opened the session: revoking that token ends the session. All servers of a store share their sessions: a
# server looks an unknown one up in the catalog, and reads every second which have ended. A form token is an HMAC of the
# session under a secret that the servers share, so a page of another site cannot know it.


SESSION_COOKIE = "turret_session"
HOST_PREFIX = "__Host-"  # of a cookie that a browser sends only over https, and that no other host may have set
_SECURE = "s."  # before a session that was opened over https: it counts only in a `__Host-` cookie
_VALUE = re.compile(r"[\w.~-]{1,1024}", re.ASCII)
SESSION_SECONDS = 12 * 3600.0  # how long a session lasts
MOST_SESSIONS = 1024  # sessions; the oldest one of the token that has the most is dropped
MOST_OF_TOKEN = 32  # sessions of one token; its oldest one is dropped
STRANGE_SECONDS = 1.0  # in which the catalog is not asked again for a session that it did not have


class Sessions:
    """Every open session that this server has seen. Methods that ask the catalog say so: they belong on a thread."""

    catalog: SessionRows | None = None  # None: this server is alone

    def __init__(
        self, clock: Callable[[], float], seconds: float = SESSION_SECONDS, limit: int = MOST_SESSIONS
    ) -> None:
        self._clock, self.seconds, self._limit = clock, seconds, limit
        self._secret, self.sign_in_secret = secrets.token_bytes(32), secrets.token_bytes(32)
        self._kept: set[str] = set()  # hashes that the catalog had
        self._strange: OrderedDict[str, float] = OrderedDict()  # hashes that the catalog did not have, and until when
        self._open: OrderedDict[str, tuple[float, str]] = OrderedDict()  # session's hash -> (end, access token's hash)

    def begin(self, token_hash: str, *, secure: bool = False) -> str:
        """Open a session, and return the value of its cookie. secure: the browser uses https."""
        session = (_SECURE if secure else "") + secrets.token_urlsafe(32)
        self._add(_session_hash(session), token_hash, self.seconds)
        return session

    def _add(self, hash: str, token_hash: str, seconds: float) -> None:
        """Keep a session, and drop the oldest one where there are too many: nobody signs out others."""
        self._open[hash] = self._clock() + seconds, token_hash
        counts = Counter(token for _, token in self._open.values())
        token, count = counts.most_common(1)[0]
        if len(self._open) > self._limit or count > MOST_OF_TOKEN:
            self._open.pop(next(each for each, (_, other) in self._open.items() if other == token))

    def token_hash(self, session: str | None) -> str | None:
        """The hash of the access token that opened the session; None if the session is unknown or has ended."""
        end, token_hash = self._open.get(_session_hash(session or ""), (0.0, ""))
        return token_hash if session and self._clock() < end else None

    def end(self, session: str | None) -> None:
        self._open.pop(_session_hash(session or ""), None)

    # --- shared with other servers ----------------------------------------------------------------------------------

    def share(self, catalog: SessionRows) -> None:
        """Share sessions, and the secrets, with the other servers of a store that can be written."""
        self.catalog = catalog
        with suppress(StoreError):
            self._secret, self.sign_in_secret = catalog.secret(FORMS), catalog.secret(SIGN_INS)

    def keep(self, session: str) -> None:
        """Add a session of this server to the catalog. Raises StoreError."""
        hash = _session_hash(session)
        if self.catalog is not None and hash in self._open:
            self.catalog.keep(hash, self._open[hash][1], self.seconds, self._limit, MOST_OF_TOKEN)
            self._kept.add(hash)

    def forget(self, session: str | None) -> None:
        """End a session on all servers, by the catalog. Raises StoreError."""
        if self.catalog is not None and session:
            self.catalog.forget(_session_hash(session))

    def is_strange(self, session: str | None) -> bool:
        """Whether only the catalog can tell if there is such a session."""
        hash = _session_hash(session or "")
        known = hash in self._open or self._clock() < self._strange.get(hash, 0.0)
        return self.catalog is not None and bool(session) and not known

    def look_up(self, session: str) -> None:
        """Read a session of another server from the catalog. Raises StoreError."""
        hash = _session_hash(session)
        found = None if self.catalog is None else self.catalog.find(hash)
        if found is not None:
            self._add(hash, *found)
            self._kept.add(hash)
            return
        self._strange[hash] = self._clock() + STRANGE_SECONDS
        while len(self._strange) > self._limit:
            self._strange.popitem(last=False)

    def refresh(self) -> None:
        """Drop sessions that have ended on another server, by the catalog. Raises StoreError."""
        if self.catalog is None or not self._open:
            return
        before = self._kept & set(self._open)  # a session that begins during the read is not dropped
        for hash in before - self.catalog.all():
            self._open.pop(hash, None)
        self._kept &= set(self._open)

    def form_token(self, session: str | None) -> str:
        """The form token of a session. All visitors without a session share one."""
        return hmac.new(self._secret, (session or "").encode(), hashlib.sha256).hexdigest()

    def is_form_token(self, session: str | None, form_token: str) -> bool:
        return hmac.compare_digest(self.form_token(session), form_token.encode("ascii", "replace").decode())


def session_of(cookies: str | None) -> str | None:
    """The session in a Cookie header."""
    plain = cookie_value(cookies, SESSION_COOKIE)
    return cookie_value(cookies, HOST_PREFIX + SESSION_COOKIE) or (
        None if plain is None or plain.startswith(_SECURE) else plain
    )


def cookie_value(cookies: str | None, name: str) -> str | None:
    """The value of the first cookie with this name in a Cookie header; None if it is missing, or none of this server.

    It takes time by the number of bytes. `http.cookies` takes quadratic time for backslashes in Pythons before 3.11.10
    and 3.12.6.
    """
    for part in (cookies or "").split(";"):
        found, _, value = part.strip().partition("=")
        if found == name:
            return value if _VALUE.fullmatch(value) else None
    return None


def session_cookie(session: str, seconds: float, *, secure: bool) -> str:
    """A Set-Cookie header. An empty session deletes the cookie."""
    max_age = int(seconds) if session else 0
    name, ending = (HOST_PREFIX + SESSION_COOKIE, "; Secure") if secure else (SESSION_COOKIE, "")
    return f"{name}={session}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Strict{ending}"


def _session_hash(session: str) -> str:
    return hashlib.sha256(session.encode("utf-8", "replace")).hexdigest()


# --- tokens -----------------------------------------------------------------------------------------------------------


LONGEST = 256  # characters of a token
READS = ("GET", "HEAD", "OPTIONS")
# Paths open to the scope infer, which admin contains; any other path needs admin, even if it does not exist.
INFER, INFER_ROUTES = "/v1/", ("/tokenize", "/detokenize")
# Paths open to several scopes.
OPEN_TO = {"/api/outcomes": ("infer", "admin"), "/openapi.json": SCOPES, "/metrics": ("admin", "metrics")}


@dataclass(frozen=True)
class Caller:
    """The sender of a request."""

    name: str | None  # of the token; None on an open server
    quota: Quota = field(default_factory=Quota)
    scopes: tuple[str, ...] = ()
    session: str | None = None  # of a page
    access: Access = NOBODY  # what exists for the sender
    expires: str | None = None  # of the token

    @property
    def tenant(self) -> str | None:
        """Its tenant; None for `default`, and without one."""
        return None if self.access.tenant in ("", DEFAULT) else self.access.tenant

    @property
    def key(self) -> str:
        """The token, as no other tenant has it."""
        return f"token {self.name}" if self.tenant is None else f"token {self.tenant}/{self.name}"


def access_of(request: Request) -> Access:
    """What exists for the sender of a request. This is the one place where a route gets it from."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return OPERATOR if caller is None else caller.access


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """The tokens of the store, and what each may do.

    Args:
        tenant: Whose adapters an open server has.

    Raises:
        ServeRefused: If the store has no token and the host is not a loopback address.
    """

    def __init__(
        self,
        host: str,
        tokens: Sequence[AccessToken],
        clock: Callable[[], float] = time.monotonic,
        tenant: Access = OPERATOR,
    ) -> None:
        self.sessions, self._tenant = Sessions(clock), tenant
        self._tokens: Sequence[AccessToken] = ()
        self._open = True
        self.set_tokens(tokens)
        if self._open and not is_loopback(host):
            raise ServeRefused(
                f"serve on {host} without tokens: expected a loopback address such as 127.0.0.1, "
                "or a token: make one with `turret token create NAME`"
            )

    @property
    def open(self) -> bool:
        return self._open

    def set_tokens(self, tokens: Sequence[AccessToken]) -> None:
        """Use the newest tokens. A store that has had a token, even a revoked one, closes the server."""
        self._tokens = [token for token in tokens if token.revoked is None]
        self._open = self._open and not tokens

    def accesses(self) -> list[Access]:
        """What the senders of requests may see."""
        return [self._tenant, *(token.access for token in self._tokens)]

    def authorize(self, path: str, authorization: str | None, host: str | None) -> Caller:
        """The caller of a route of the API. Raises Unauthorized or Forbidden."""
        if self._open:
            return self._anyone(host)
        token = self._token(authorization)
        own = ("infer", "admin") if path.startswith(INFER) or path in INFER_ROUTES else ("admin",)
        if not set(token.scopes) & set(wanted := OPEN_TO.get(path, own)):
            needed = " or ".join(wanted)
            make = f"`turret token create NAME --scope {wanted[0]}` makes one"
            raise Forbidden(f"token {token.name!r} has no scope {needed}: use one that has; {make}")
        return _caller(token)

    def authorize_page(self, path: str, session: str | None, host: str | None) -> Caller:
        """The caller of a page. Raises Unauthorized or Forbidden."""
        if self._open:
            return self._anyone(host)
        token_hash, at = self.sessions.token_hash(session), now()
        token = next((each for each in self._tokens if token_hash in each.hashes(at) and each.lives(at)), None)
        if token is None and first_segment(path) not in UNSIGNED:
            raise Unauthorized("you are not signed in: sign in with a token of `turret token create`")
        if token is None:
            return Caller(None)
        if "admin" not in token.scopes and first_segment(path) not in INFER_PAGES | UNSIGNED:
            raise Forbidden(
                f"token {token.name!r} has no scope admin: it opens the playground; "
                "`turret token create NAME --scope admin` makes one for all pages"
            )
        return _caller(token, session)

    def caller_of(self, key: str) -> Caller | None:
        """The caller with this key, while its token is valid; "" is anyone, while the server is open."""
        if not key:
            return Caller(None, scopes=SCOPES, access=self._tenant) if self._open else None
        at = now()
        callers = (_caller(token) for token in self._tokens if token.lives(at))
        return next((caller for caller in callers if caller.key == key), None)

    def sign_in(self, secret: str, *, secure: bool = False) -> str:
        """Open a session with a token. secure: over https. Raises Unauthorized."""
        _require_pages(self._token(f"Bearer {secret}"))
        return self.sessions.begin(hash_secret(secret.strip()), secure=secure)

    def sign_in_as(self, name: str, tenant: str, *, secure: bool = False) -> str:
        """Open a session with the token of this name. Its tenant and name come from a trusted provider.

        Raises Unauthorized.
        """
        token = next((each for each in self._tokens if (each.name, each.access.tenant) == (name, tenant)), None)
        if token is None or not token.sign_in or not token.lives(now()):
            raise Unauthorized(f"there is no token for {ascii(name)[:60]}: ask an operator for `turret token create`")
        _require_pages(token)
        return self.sessions.begin(token.hash, secure=secure)

    def _anyone(self, host: str | None) -> Caller:
        if host is not None and not is_loopback(_without_port(host)):
            raise Forbidden("a server without tokens answers to loopback names only: use 127.0.0.1, or make tokens")
        return Caller(None, scopes=SCOPES, access=self._tenant)

    def _token(self, authorization: str | None) -> AccessToken:
        if authorization is None:
            raise Unauthorized("no token: expected the header Authorization: Bearer TOKEN")
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer" or not secret.strip() or len(secret) > LONGEST:
            raise Unauthorized("the authorization cannot be read: expected Bearer TOKEN")
        token = token_with_secret(self._tokens, secret.strip())
        if token is None or not token.lives(now()):
            raise Unauthorized(
                "the token is unknown, has expired or was revoked: make one with `turret token create NAME`"
            )
        return token


def _require_pages(token: AccessToken) -> None:
    """Raise Unauthorized for a token that opens no page."""
    if not token.sign_in:
        raise Unauthorized(f"token {token.name!r} was made with --no-sign-in: no person signs in by it")
    if not set(token.scopes) & {"infer", "admin"}:
        raise Unauthorized(f"token {token.name!r} opens no page: expected one with the scope infer or admin")


def _caller(token: AccessToken, session: str | None = None) -> Caller:
    quota = Quota(token.requests_per_minute, token.tokens_per_minute)
    return Caller(token.name, quota, token.scopes, session, token.access, token.expires)


def check_origin(method: str, headers: Mapping[bytes, str], *, page: bool) -> None:
    """Refuse a write that a page of another site sends. Raises Forbidden.

    A browser names the origin of a write. A program may name none, which is enough for the API but not for a form.
    """
    if method in READS:
        return
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None:
        same = site == "same-origin" or (site == "none" and not page)
    elif origin is not None:
        same = origin.partition("://")[2] == (headers.get(b"host") or "-")
    else:
        same = not page
    if not same:
        raise Forbidden("a page of another site sent this, and nothing was done: use the server's own pages")


def _without_port(host: str) -> str:
    """`127.0.0.1:8000` -> `127.0.0.1`, `[::1]:8000` -> `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


# --- middleware ------------------------------------------------------------------------------------------------------


def require_unambiguous(scope: Scope) -> None:
    """Refuse a request that a proxy and this server could read in two ways. Raises BadRequest.

    With Content-Length and Transfer-Encoding in one request, a proxy may use one and the server the other. What one of
    them takes for the body is then the next request of the other (request smuggling, RFC 9112, section 6.3). With two
    Authorization headers, a proxy may have checked the first one and the server would use the last one; two Cookie
    headers are refused for the same reason.
    """
    names = [name.lower() for name, _ in scope["headers"]]
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise BadRequest("the request has both Content-Length and Transfer-Encoding: send one of them")
        if scope["http_version"] == "1.0":
            raise BadRequest("the request is HTTP/1.0 and has Transfer-Encoding: send Content-Length")
    for name in (b"authorization", b"cookie"):
        if names.count(name) > 1:
            raise BadRequest(f"the request has two {name.decode().title()} headers: send one")


class AuthMiddleware:
    """Refuses requests without the right token, and ambiguous ones. Routes find the caller in `request.state.caller`.

    Args:
        page_response: Sends the responses to a page, so that the errors of this middleware become pages too.
        look_up: Looks for a session that another server of the store opened: the session, and the client.
        origins: Of pages that may write to the API of a server without tokens.
    """

    def __init__(
        self,
        app: ASGIApp,
        guard: Guard,
        page_response: Callable[[Scope, Send], Send],
        look_up: Callable[[str, str], Awaitable[None]],
        origins: Sequence[str] = (),
    ) -> None:
        self.app = app
        self.guard = guard
        self.page_response, self.look_up = page_response, look_up
        self.origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = is_page(scope["path"])
        if page:
            send = self.page_response(scope, send)
        try:
            require_unambiguous(scope)
            caller = None if scope["path"] in OPEN else await self._caller(scope, page=page)
        except TurretError as error:
            await send_error(error, scope, receive, send, close=True)
            return
        if caller is None:
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        with acting(None if caller.name is None else caller.key):
            await self.app(scope, receive, send)

    async def _caller(self, scope: Scope, *, page: bool) -> Caller:
        path, headers = scope["path"], {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host")
        if page and (session := session_of(headers.get(b"cookie"))) is not None:
            await self.look_up(session, client_of(scope.get("client")) or "")
        if page or (self.guard.open and headers.get(b"origin") not in self.origins):
            check_origin(scope["method"], headers, page=page)
        if page:
            return self.guard.authorize_page(path, session_of(headers.get(b"cookie")), host)
        return self.guard.authorize(path, headers.get(b"authorization"), host)


# --- cross origin -----------------------------------------------------------------------------------------------------
# Pages of other sites that may call the API from a browser (CORS). The console's pages stay closed to them.


ANY_ORIGIN = "*"
REMEMBERED = 600  # seconds for which a browser need not ask again
READ = (
    "turret-receipt",
    "turret-adapter",
    "turret-version",
    "turret-digest",
    "turret-base",
    "turret-panel",
    "turret-truncated",
    "turret-ignored",
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
        if text != ANY_ORIGIN and not _ORIGIN.fullmatch(text):
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
        await (self.app if is_page(scope["path"]) else self.api)(scope, receive, send)
