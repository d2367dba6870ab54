"""Access tokens of a server: a row per token.

A token is shown once, and only its SHA-256 is stored. It has 256 random bits, so a plain hash cannot be reversed by
search. It belongs to a tenant, and its name is unique there. A rotation gives it a new secret; the one before stays
valid for a while, so that clients can change over one after another.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Literal, get_args

from sqlalchemy import Connection, Select, delete, func, insert, select, update

from turret import audit
from turret.access import ANY, DEFAULT, Access, check_patterns
from turret.arguments import checked_methods
from turret.database import Database, access_of, server_secrets, sessions, tokens, upsert
from turret.errors import BadReference, InUse, NotFound
from turret.json_types import JsonObject, Plain
from turret.store.catalog import now, who
from turret.store.leases import clock
from turret.timestamp import timestamp

# --- session rows -----------------------------------------------------------------------------------------------------
# Sessions of the console in the catalog, so that every server of the store knows them.
#
# A row has the hash of the session's cookie, the hash of the access token that opened it, and its end by the catalog's
# clock. The cookie itself is stored nowhere. The secrets of form tokens and of sign-ins by a provider are in a table of
# their own.


FORMS, SIGN_INS = "forms", "sign-ins"  # secrets


class SessionRows:
    """The sessions of one store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def keep(self, hash: str, token: str, seconds: float, most: int, most_of_token: int) -> None:
        """Add a session that lasts so long, and remove those that have ended.

        Beyond `most_of_token`, the oldest one of its token is removed; beyond `most`, the oldest one of the token that
        has the most.
        """
        with self._database.writing() as connection:
            now = clock(connection)
            connection.execute(delete(sessions).where(sessions.c.ends <= now))
            connection.execute(insert(sessions).values(hash=hash, token=token, ends=now + seconds))
            count = func.count()
            counts = select(sessions.c.token, count).group_by(sessions.c.token)
            counts = counts.order_by(count.desc(), func.min(sessions.c.ends))
            held = {str(row[0]): int(row[1]) for row in connection.execute(counts)}
            if held[token] > most_of_token:
                _drop_oldest(connection, token, held[token] - most_of_token)
            elif sum(held.values()) > most:
                _drop_oldest(connection, next(iter(held)), 1)

    def find(self, hash: str) -> tuple[str, float] | None:
        """The token's hash, and the seconds that are left; None if there is no such session."""
        with self._database.reading() as connection:
            row = connection.execute(select(sessions).where(sessions.c.hash == hash)).first()
            left = 0.0 if row is None else row.ends - clock(connection)
        return None if row is None or left <= 0 else (row.token, left)

    def forget(self, hash: str) -> None:
        """End a session on every server."""
        with self._database.writing() as connection:
            connection.execute(delete(sessions).where(sessions.c.hash == hash))

    def secret(self, name: str) -> bytes:
        """The secret with this name, which the first server makes."""
        query = select(server_secrets.c.value).where(server_secrets.c.name == name)
        with self._database.reading() as connection:
            found = connection.execute(query).scalar()
        if found is None:
            with self._database.writing() as connection:
                new = {"name": name, "value": secrets.token_hex(32)}
                upsert(connection, server_secrets, [new], change=None)
                found = connection.execute(query).scalar_one()  # another server may have been earlier
        return bytes.fromhex(found)

    def all(self) -> set[str]:
        """The hashes of all sessions."""
        with self._database.reading() as connection:
            return set(connection.execute(select(sessions.c.hash)).scalars())


def _drop_oldest(connection: Connection, token: str, count: int) -> None:
    oldest = select(sessions.c.hash).where(sessions.c.token == token).order_by(sessions.c.ends).limit(count)
    connection.execute(delete(sessions).where(sessions.c.hash.in_(connection.execute(oldest).scalars().all())))


# --- access tokens ----------------------------------------------------------------------------------------------------


Scope = Literal["infer", "admin", "metrics", "operate"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
OPERATE = "operate"  # of the tenant `default` alone: to manage the tokens of all tenants, and see what they use
PREFIX = "turret-"
OVERLAP = 86400.0  # seconds for which the secret before a rotation stays valid
LONGEST = 10 * 366 * 86400.0  # seconds of a lifetime or an overlap
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)


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
    tenant: str = DEFAULT
    adapters: tuple[str, ...] = ANY  # names or patterns
    bases: tuple[str, ...] = ANY
    expires: str | None = None
    former_hash: str | None = field(default=None, repr=False)  # of the secret before the last rotation
    former_until: str | None = None
    sign_in: bool = True  # whether a person may sign in by it: with its secret, or with its name by a provider

    @property
    def access(self) -> Access:
        """What the token sees."""
        return Access(self.tenant, self.adapters, self.bases)

    def lives(self, at: str) -> bool:
        """Whether it was neither revoked nor has expired at this time."""
        return self.revoked is None and (self.expires is None or at < self.expires)

    def hashes(self, at: str) -> tuple[str, ...]:
        """The hashes of its valid secrets at this time."""
        former = self.former_hash if self.former_until is not None and at < self.former_until else None
        return (self.hash,) if former is None else (self.hash, former)

    def as_json(self) -> JsonObject:
        """The token as `turret token list --json` prints it, without the hashes."""
        lists = {"scopes": list(self.scopes), "adapters": list(self.adapters), "bases": list(self.bases)}
        fields = asdict(self) | lists
        del fields["hash"], fields["former_hash"]
        return fields


def hash_secret(secret: str) -> str:
    """The hash of a token, which the store keeps."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def token_with_secret(known: Iterable[AccessToken], secret: str) -> AccessToken | None:
    """The known token with this secret, or None. Says nothing of whether it lives.

    Compares with every token, each in constant time, so the duration reveals nothing.
    """
    given, found, at = hash_secret(secret), None, now()
    for token in known:
        for each in token.hashes(at):
            if hmac.compare_digest(each, given):
                found = token
    return found


@checked_methods
class AccessTokens:
    """The tokens of a tenant.

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
        scopes: Sequence[str] = ("infer",),
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        adapters: Sequence[str] = ANY,
        bases: Sequence[str] = ANY,
        lifetime: float | None = None,
        sign_in: bool = True,
    ) -> tuple[AccessToken, str]:
        """Create a token of the tenant.

        Args:
            adapters: names or patterns such as `legal-*`.
            bases: ids of bases, or patterns.
            lifetime: seconds until it expires; None for no end.
            requests_per_minute: None for no quota.
            tokens_per_minute: None for no quota.
            sign_in: whether a person may sign in to the console by it.

        Returns:
            The stored token, and its secret, which cannot be shown again.

        Raises:
            BadReference: a bad name, scope, pattern, lifetime or quota.
            InUse: the name is or was taken.
        """
        _check(name, scopes, requests_per_minute, tokens_per_minute)
        seen, seen_bases = check_patterns(adapters, bases)
        secret, created = PREFIX + secrets.token_urlsafe(32), now()
        row = {
            "name": name,
            "hash": hash_secret(secret),
            "scopes": [scope for scope in SCOPES if scope in scopes],
            "created": created,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "adapters": list(seen),
            "bases": list(seen_bases),
            "sign_in": sign_in,
            "expires": None if lifetime is None else _later(created, lifetime, "a lifetime"),
        }
        with self._open_or_create().writing() as connection:
            if OPERATE in scopes and access_of(connection).tenant != DEFAULT:
                raise BadReference(f"scope {OPERATE} for tenant {access_of(connection).tenant}: only {DEFAULT} has it")
            if any(token.name == name for token in _all(connection)):
                raise InUse(f"a token {name!r} exists or existed: expected a new name, such as {name}-2")
            connection.execute(insert(tokens).values(tenant=access_of(connection).tenant, **row))
            made = next(token for token in _all(connection) if token.name == name)
            _audit(connection, "token create", None, made)
            return made, secret

    def list(self) -> Sequence[AccessToken]:
        """All tokens of the tenant by name, including revoked ones."""
        return self._read_by(_all)

    def of_all_tenants(self) -> Sequence[AccessToken]:
        """The tokens of all tenants, including revoked ones: a server knows its callers by them."""
        return self._read_by(lambda connection: _read_tokens(connection, _QUERY))

    def _read_by(self, read: Callable[[Connection], Sequence[AccessToken]]) -> Sequence[AccessToken]:
        database = self._open()
        if database is None:
            return ()
        with database.reading() as connection:
            return read(connection)

    def revoke(self, name: str) -> AccessToken:
        """Revoke a token; raises NotFound. Servers notice within a second. The name stays taken."""
        return self._change(name, "token revoke", lambda token: {} if token.revoked else {"revoked": now()})

    def rotate(self, name: str, overlap: float = OVERLAP) -> tuple[AccessToken, str]:
        """Give a token a new secret. Running servers know it within a second.

        Args:
            overlap: seconds for which the secret so far stays valid. One before that ends now.

        Returns:
            The stored token, and its new secret, which cannot be shown again.

        Raises:
            NotFound: there is no such token.
            InUse: it was revoked, or has expired.
            BadReference: a bad overlap.
        """
        secret = PREFIX + secrets.token_urlsafe(32)

        def renewed(token: AccessToken) -> Mapping[str, Plain]:
            at = now()
            if not token.lives(at):
                raise InUse(f"token {name!r} was revoked or has expired: make one with another name, such as {name}-2")
            until = _later(at, overlap, "an overlap") if overlap else None
            former = token.hash if overlap else None
            return {"hash": hash_secret(secret), "former_hash": former, "former_until": until}

        return self._change(name, "token rotate", renewed), secret

    def _change(self, name: str, verb: str, changed: Callable[[AccessToken], Mapping[str, Plain]]) -> AccessToken:
        """Change the columns that `changed` says; raises NotFound."""
        names = [token.name for token in self.list()]
        if name not in names:
            raise NotFound(f"no token named {ascii(name)[:60]}: the store has {', '.join(names[:8]) or 'none'}")
        with self._open_or_create().writing() as connection:
            own = (tokens.c.tenant == access_of(connection).tenant) & (tokens.c.name == name)
            before = next(token for token in _all(connection) if token.name == name)
            if not (values := changed(before)):
                return before
            connection.execute(update(tokens).where(own).values(values))
            after = next(token for token in _all(connection) if token.name == name)
            _audit(connection, verb, before, after)
            return after


def _check(name: str, scopes: Sequence[str], *quotas: int | None) -> None:
    if not NAME.fullmatch(name):
        raise BadReference(
            f"bad token name {ascii(name)[:60]}: expected 1 to 100 of A-Z a-z 0-9 . _ -, a letter or digit first"
        )
    if not scopes or any(scope not in SCOPES for scope in scopes):
        raise BadReference(f"bad scopes {', '.join(scopes)[:60] or '(none)'}: expected some of {', '.join(SCOPES)}")
    if any(quota is not None and quota < 1 for quota in quotas):
        raise BadReference("a quota must be at least 1 per minute: omit it for no quota")


def _audit(connection: Connection, verb: str, before: AccessToken | None, after: AccessToken) -> None:
    """Record a change of a token, without any hash."""
    what, former, made = f"token {after.name}", None if before is None else before.as_json(), after.as_json()
    audit.record(connection, verb, what, None, before=former, after=made, at=now(), who=who())


def _later(at: str, seconds: float, what: str) -> str:
    if not 1 <= seconds <= LONGEST:
        raise BadReference(f"{what} of {seconds:g} seconds: expected from 1 second to 10 years, such as 90d")
    return timestamp(datetime.fromisoformat(at) + timedelta(seconds=seconds))


_QUERY = select(*(column for column in tokens.c if column.name != "id")).order_by(tokens.c.tenant, tokens.c.name)


def _all(connection: Connection) -> list[AccessToken]:
    return _read_tokens(connection, _QUERY.where(tokens.c.tenant == access_of(connection).tenant))


def _read_tokens(connection: Connection, query: Select[tuple[Plain, ...]]) -> list[AccessToken]:
    lists = ("scopes", "adapters", "bases")
    return [
        AccessToken(**{**row._mapping, **{each: tuple(row._mapping[each] or ANY) for each in lists}})
        for row in connection.execute(query)
    ]
