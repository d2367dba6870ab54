"""Sessions of the console, in memory, and the form token that each form of a session carries.

The browser keeps 256 random bits as a cookie. The server keeps only the hash of them, with the hash of the access token
that opened the session: revoking that token ends the session. A form token is an HMAC of the session under a secret of
this server, so a page of another site cannot know it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

COOKIE = "turret_session"
SECONDS = 12 * 3600.0  # how long a session lasts
LIMIT = 1024  # sessions; the oldest one is dropped


class Sessions:
    """Every open session."""

    def __init__(self, clock: Callable[[], float], seconds: float = SECONDS, limit: int = LIMIT) -> None:
        self._clock, self.seconds, self._limit = clock, seconds, limit
        self._secret = secrets.token_bytes(32)
        self._open: OrderedDict[str, tuple[float, str]] = OrderedDict()  # session's hash -> (end, access token's hash)

    def begin(self, token_hash: str) -> str:
        """Open a session, and return the value of its cookie."""
        session = secrets.token_urlsafe(32)
        self._open[_hashed(session)] = self._clock() + self.seconds, token_hash
        while len(self._open) > self._limit:
            self._open.popitem(last=False)
        return session

    def token_hash(self, session: str | None) -> str | None:
        """The hash of the access token that opened the session; None if the session is unknown or has ended."""
        end, token_hash = self._open.get(_hashed(session or ""), (0.0, ""))
        return token_hash if session and self._clock() < end else None

    def end(self, session: str | None) -> None:
        self._open.pop(_hashed(session or ""), None)

    def form_token(self, session: str | None) -> str:
        """The form token of a session. All visitors without a session share one."""
        return hmac.new(self._secret, (session or "").encode(), hashlib.sha256).hexdigest()

    def is_form_token(self, session: str | None, form_token: str) -> bool:
        return hmac.compare_digest(self.form_token(session), form_token.encode("ascii", "replace").decode())

    def __len__(self) -> int:
        return len(self._open)


def session_of(cookies: str | None) -> str | None:
    """The session in a Cookie header."""
    try:
        found = SimpleCookie(cookies or "").get(COOKIE)
    except CookieError:
        return None
    return found.value if found is not None else None


def cookie(session: str, seconds: float, *, secure: bool) -> str:
    """A Set-Cookie header. An empty session deletes the cookie."""
    max_age = int(seconds) if session else 0
    return f"{COOKIE}={session}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Strict{'; Secure' if secure else ''}"


def _hashed(session: str) -> str:
    return hashlib.sha256(session.encode("utf-8", "replace")).hexdigest()
