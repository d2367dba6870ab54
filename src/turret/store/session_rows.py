"""Sessions of the console in the catalog, so that every server of the store knows them.

A row has the hash of the session's cookie, the hash of the access token that opened it, and its end by the catalog's
clock. The cookie itself is stored nowhere. The secrets of form tokens and of sign-ins by a provider are in a table of
their own.
"""

from __future__ import annotations

import secrets

from sqlalchemy import Column, Connection, Float, String, Table, delete, func, insert, select

from turret.database import Database, metadata
from turret.store.leases import clock

sessions = Table(
    "sessions",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("token", String(80), nullable=False),
    Column("ends", Float, nullable=False),
)
server_secrets = Table(
    "server_secrets",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", String(64), nullable=False),
)
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
                found = connection.execute(query).scalar()  # another server may have been earlier
                if found is None:
                    found = secrets.token_hex(32)
                    connection.execute(insert(server_secrets).values(name=name, value=found))
        return bytes.fromhex(found)

    def all(self) -> set[str]:
        """The hashes of all sessions."""
        with self._database.reading() as connection:
            return set(connection.execute(select(sessions.c.hash)).scalars())


def _drop_oldest(connection: Connection, token: str, count: int) -> None:
    oldest = select(sessions.c.hash).where(sessions.c.token == token).order_by(sessions.c.ends).limit(count)
    connection.execute(delete(sessions).where(sessions.c.hash.in_(connection.execute(oldest).scalars().all())))
