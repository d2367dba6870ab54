"""Who may ask a server: a row a token. The token itself is shown once and kept nowhere; its SHA-256 is.

A token is 256 random bits, so a plain hash of it cannot be searched. Refuses to know HTTP and files.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from sqlalchemy import Connection, insert, select, update

from turret.database import Database, tokens
from turret.errors import BadReference, InUse, NotFound
from turret.store.catalog import now

Scope = Literal["infer", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "turret-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class AccessToken:
    """What is known of a token; not the token."""

    name: str
    scopes: tuple[Scope, ...]
    created: str  # ISO 8601, UTC
    revoked: str | None
    requests_per_minute: int | None  # None: no quota
    tokens_per_minute: int | None
    hash: str = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """What `turret token list --json` says; never the hash."""
        said = asdict(self) | {"scopes": list(self.scopes)}
        del said["hash"]
        return said


def hashed(secret: str) -> str:
    """What is kept of a token."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def which(known: Iterable[AccessToken], secret: str) -> AccessToken | None:
    """The token that this is. Every one is compared, each in constant time: how long it takes tells nothing."""
    asked, found = hashed(secret), None
    for token in known:
        if hmac.compare_digest(token.hash, asked):
            found = token
    return found


class AccessTokens:
    """The table. `there` gives the database where there is one, `made` makes it."""

    def __init__(self, there: Callable[[], Database | None], made: Callable[[], Database]) -> None:
        self._there = there
        self._made = made

    def create(
        self,
        name: str,
        scopes: Sequence[Scope] = ("infer",),
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[AccessToken, str]:
        """(what is kept, the token itself, which nothing can show again)."""
        _check(name, scopes, requests_per_minute, tokens_per_minute)
        secret = PREFIX + secrets.token_urlsafe(32)
        row = {
            "name": name,
            "hash": hashed(secret),
            "scopes": [scope for scope in SCOPES if scope in scopes],
            "created": now(),
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        }
        with self._made().writing() as connection:
            if any(token.name == name for token in _all(connection)):
                raise InUse(f"there is a token {name!r} already, or was: expected a new name, such as {name}-2")
            connection.execute(insert(tokens).values(row))
            return next(token for token in _all(connection) if token.name == name), secret

    def list(self) -> Sequence[AccessToken]:
        """Every token by name, revoked ones too."""
        database = self._there()
        if database is None:
            return ()
        with database.reading() as connection:
            return _all(connection)

    def revoke(self, name: str) -> AccessToken:
        """From now on the token is unknown; servers follow within a second. Its name stays taken."""
        if all(token.name != name for token in self.list()):
            known = ", ".join(token.name for token in self.list()[:8]) or "none"
            raise NotFound(f"no token named {ascii(name)[:60]}: the store has {known}")
        with self._made().writing() as connection:
            found = next(token for token in _all(connection) if token.name == name)
            if found.revoked is None:
                connection.execute(update(tokens).where(tokens.c.name == name).values(revoked=now()))
            return next(token for token in _all(connection) if token.name == name)


def _check(name: str, scopes: Sequence[str], *quotas: int | None) -> None:
    if not _NAME.fullmatch(name):
        raise BadReference(
            f"bad token name {ascii(name)[:60]}: expected 1 to 100 of A-Z a-z 0-9 . _ -, a letter or digit first"
        )
    if not scopes or any(scope not in SCOPES for scope in scopes):
        raise BadReference(f"bad scopes {', '.join(scopes)[:60] or '(none)'}: expected some of {', '.join(SCOPES)}")
    if any(quota is not None and quota < 1 for quota in quotas):
        raise BadReference("a quota is a number a minute, at least 1: leave it out for none")


def _all(connection: Connection) -> list[AccessToken]:
    columns = [column for column in tokens.c if column.name != "id"]
    rows = connection.execute(select(*columns).order_by(tokens.c.name))
    return [AccessToken(**{**row._mapping, "scopes": tuple(row.scopes)}) for row in rows]
