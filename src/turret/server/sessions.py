"""Sessions of the console, and the form token that each form of a session carries.

The browser keeps 256 random bits as a cookie. The server keeps only the hash of them, with the hash of the access token
that opened the session: revoking that token ends the session. All servers of a store share their sessions: a server
looks an unknown one up in the catalog, and reads every second which have ended. A form token is an HMAC of the session
under a secret that the servers share, so a page of another site cannot know it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress

from turret.errors import StoreError
from turret.store.access_tokens import FORMS, SIGN_INS, SessionRows

COOKIE = "turret_session"
HOST = "__Host-"  # of a cookie that a browser sends only over https, and that no other host may have set
_SECURE = "s."  # before a session that was opened over https: it counts only in a `__Host-` cookie
_VALUE = re.compile(r"[\w.~-]{1,1024}", re.ASCII)
SECONDS = 12 * 3600.0  # how long a session lasts
LIMIT = 1024  # sessions; the oldest one of the token that has the most is dropped
LIMIT_OF_TOKEN = 32  # sessions of one token; its oldest one is dropped
STRANGE_SECONDS = 1.0  # in which the catalog is not asked again for a session that it did not have


class Sessions:
    """Every open session that this server has seen. Methods that ask the catalog say so: they belong on a thread."""

    catalog: SessionRows | None = None  # None: this server is alone

    def __init__(self, clock: Callable[[], float], seconds: float = SECONDS, limit: int = LIMIT) -> None:
        self._clock, self.seconds, self._limit = clock, seconds, limit
        self._secret, self.sign_in_secret = secrets.token_bytes(32), secrets.token_bytes(32)
        self._kept: set[str] = set()  # hashes that the catalog had
        self._strange: OrderedDict[str, float] = OrderedDict()  # hashes that the catalog did not have, and until when
        self._open: OrderedDict[str, tuple[float, str]] = OrderedDict()  # session's hash -> (end, access token's hash)

    def begin(self, token_hash: str, *, secure: bool = False) -> str:
        """Open a session, and return the value of its cookie. secure: the browser uses https."""
        session = (_SECURE if secure else "") + secrets.token_urlsafe(32)
        self._add(_hashed(session), token_hash, self.seconds)
        return session

    def _add(self, hash: str, token_hash: str, seconds: float) -> None:
        """Keep a session, and drop the oldest one where there are too many: nobody signs out others."""
        self._open[hash] = self._clock() + seconds, token_hash
        counts = Counter(token for _, token in self._open.values())
        token, count = counts.most_common(1)[0]
        if len(self._open) > self._limit or count > LIMIT_OF_TOKEN:
            self._open.pop(next(each for each, (_, other) in self._open.items() if other == token))

    def token_hash(self, session: str | None) -> str | None:
        """The hash of the access token that opened the session; None if the session is unknown or has ended."""
        end, token_hash = self._open.get(_hashed(session or ""), (0.0, ""))
        return token_hash if session and self._clock() < end else None

    def end(self, session: str | None) -> None:
        self._open.pop(_hashed(session or ""), None)

    # --- shared with other servers ----------------------------------------------------------------------------------

    def share(self, catalog: SessionRows) -> None:
        """Share sessions, and the secrets, with the other servers of a store that can be written."""
        self.catalog = catalog
        with suppress(StoreError):
            self._secret, self.sign_in_secret = catalog.secret(FORMS), catalog.secret(SIGN_INS)

    def keep(self, session: str) -> None:
        """Add a session of this server to the catalog. Raises StoreError."""
        hash = _hashed(session)
        if self.catalog is not None and hash in self._open:
            self.catalog.keep(hash, self._open[hash][1], self.seconds, self._limit, LIMIT_OF_TOKEN)
            self._kept.add(hash)

    def forget(self, session: str | None) -> None:
        """End a session on all servers, by the catalog. Raises StoreError."""
        if self.catalog is not None and session:
            self.catalog.forget(_hashed(session))

    def is_strange(self, session: str | None) -> bool:
        """Whether only the catalog can tell if there is such a session."""
        hash = _hashed(session or "")
        known = hash in self._open or self._clock() < self._strange.get(hash, 0.0)
        return self.catalog is not None and bool(session) and not known

    def look_up(self, session: str) -> None:
        """Read a session of another server from the catalog. Raises StoreError."""
        hash = _hashed(session)
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

    def __len__(self) -> int:
        return len(self._open)


def session_of(cookies: str | None) -> str | None:
    """The session in a Cookie header."""
    plain = cookie_value(cookies, COOKIE)
    return cookie_value(cookies, HOST + COOKIE) or (None if plain is None or plain.startswith(_SECURE) else plain)


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


def cookie(session: str, seconds: float, *, secure: bool) -> str:
    """A Set-Cookie header. An empty session deletes the cookie."""
    max_age = int(seconds) if session else 0
    name, ending = (HOST + COOKIE, "; Secure") if secure else (COOKIE, "")
    return f"{name}={session}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Strict{ending}"


def _hashed(session: str) -> str:
    return hashlib.sha256(session.encode("utf-8", "replace")).hexdigest()
