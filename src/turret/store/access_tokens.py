"""Access tokens of a server: a row per token.

A token is shown once, and only its SHA-256 is stored. It has 256 random bits, so a plain hash cannot be reversed by
search.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from sqlalchemy import Connection, insert, select, update

from turret.database import Database, tokens
from turret.errors import BadReference, InUse, NotFound
from turret.json_types import JsonObject
from turret.store.catalog import now

Scope = Literal["infer", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "turret-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class AccessToken:
    """A stored token, without its secret."""

    name: str
    scopes: tuple[Scope, ...]
    created: str  # ISO 8601, UTC
    revoked: str | None
    requests_per_minute: int | None  # None: no quota
    tokens_per_minute: int | None
    hash: str = field(repr=False)

    def as_json(self) -> JsonObject:
        """The token as `turret token list --json` prints it, without the hash."""
        fields = asdict(self) | {"scopes": list(self.scopes)}
        del fields["hash"]
        return fields


def hashed(secret: str) -> str:
    """The hash of a token, which the store keeps."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def which(known: Iterable[AccessToken], secret: str) -> AccessToken | None:
    """The known token with this secret, or None.

    Compares with every token, each in constant time, so the duration reveals nothing.
    """
    given, found = hashed(secret), None
    for token in known:
        if hmac.compare_digest(token.hash, given):
            found = token
    return found


class AccessTokens:
    """The tokens of a store.

    Args:
        open_: opens the database, or returns None if it does not exist.
        open_or_create: opens the database, and creates it if needed.
    """

    def __init__(self, open_: Callable[[], Database | None], open_or_create: Callable[[], Database]) -> None:
        self._open = open_
        self._open_or_create = open_or_create

    def create(
        self,
        name: str,
        scopes: Sequence[Scope] = ("infer",),
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[AccessToken, str]:
        """Create a token.

        Args:
            requests_per_minute: None for no quota.
            tokens_per_minute: None for no quota.

        Returns:
            The stored token, and its secret, which cannot be shown again.

        Raises:
            BadReference: a bad name, scope or quota.
            InUse: the name is or was taken.
        """
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
        with self._open_or_create().writing() as connection:
            if any(token.name == name for token in _all(connection)):
                raise InUse(f"a token {name!r} exists or existed: expected a new name, such as {name}-2")
            connection.execute(insert(tokens).values(row))
            return next(token for token in _all(connection) if token.name == name), secret

    def list(self) -> Sequence[AccessToken]:
        """All tokens by name, including revoked ones."""
        database = self._open()
        if database is None:
            return ()
        with database.reading() as connection:
            return _all(connection)

    def revoke(self, name: str) -> AccessToken:
        """Revoke a token; raises NotFound. Servers notice within a second. The name stays taken."""
        if all(token.name != name for token in self.list()):
            known = ", ".join(token.name for token in self.list()[:8]) or "none"
            raise NotFound(f"no token named {ascii(name)[:60]}: the store has {known}")
        with self._open_or_create().writing() as connection:
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
        raise BadReference("a quota must be at least 1 per minute: omit it for no quota")


def _all(connection: Connection) -> list[AccessToken]:
    columns = [column for column in tokens.c if column.name != "id"]
    rows = connection.execute(select(*columns).order_by(tokens.c.name))
    return [AccessToken(**{**row._mapping, "scopes": tuple(row.scopes)}) for row in rows]
