"""Who is signed in to the pages: sessions in memory, bounded and with an end, and the token that each form carries.

A session is 256 random bits that the browser keeps as a cookie; here it stands for the hash of the token that began
it, so a token that is revoked ends its sessions. A form's token is made of the session and a secret of this server: a
page of another site cannot know it. Refuses to know HTTP, torch and clocks.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

COOKIE = "turret_session"
SECONDS = 12 * 3600.0  # that a session lasts
MOST = 1024  # sessions; the oldest goes


class Sessions:
    """Begun by a token, ended by its owner, by time or by too many others."""

    def __init__(self, clock: Callable[[], float], seconds: float = SECONDS, most: int = MOST) -> None:
        self._clock, self.seconds, self._most = clock, seconds, most
        self._secret = secrets.token_bytes(32)
        self._known: OrderedDict[str, tuple[float, str]] = OrderedDict()  # of the session: its end, the token's hash

    def begin(self, token_hash: str) -> str:
        """What the browser keeps; only its hash is kept here."""
        session = secrets.token_urlsafe(32)
        self._known[_hashed(session)] = self._clock() + self.seconds, token_hash
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return session

    def whose(self, session: str | None) -> str | None:
        """The hash of the token that began it; None where it has ended, or never was."""
        end, token_hash = self._known.get(_hashed(session or ""), (0.0, ""))
        return token_hash if session and self._clock() < end else None

    def end(self, session: str | None) -> None:
        self._known.pop(_hashed(session or ""), None)

    def form_token(self, session: str | None) -> str:
        """What every form of this session carries; on an open server, or before signing in, there is one for all."""
        return hmac.new(self._secret, (session or "").encode(), hashlib.sha256).hexdigest()

    def is_ours(self, session: str | None, form_token: str) -> bool:
        return hmac.compare_digest(self.form_token(session), form_token.encode("ascii", "replace").decode())

    def __len__(self) -> int:
        return len(self._known)


def session_of(cookies: str | None) -> str | None:
    """The session in a Cookie header."""
    try:
        found = SimpleCookie(cookies or "").get(COOKIE)
    except CookieError:
        return None
    return found.value if found is not None else None


def cookie(session: str, seconds: float, *, secure: bool) -> str:
    """A Set-Cookie header; an empty session takes the cookie away."""
    life = int(seconds) if session else 0
    return f"{COOKIE}={session}; Path=/; Max-Age={life}; HttpOnly; SameSite=Strict{'; Secure' if secure else ''}"


def _hashed(session: str) -> str:
    return hashlib.sha256(session.encode("utf-8", "replace")).hexdigest()
