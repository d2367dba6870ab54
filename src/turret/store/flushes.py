"""Sums that a process adds to the catalog again after an error are added once.

The answer to a COMMIT may be lost, so a process that got an error does not know whether its sums were added. It keeps
what it wanted to add under a number, and tries again with the same number. The transaction that adds the sums moves
the writer's number on; if it finds that number there, an earlier try was committed.
"""

from __future__ import annotations

import secrets

from sqlalchemy import BigInteger, Column, Connection, Float, String, Table, delete, insert, select, update

from turret.database import metadata
from turret.store.leases import clock

OLD = 30 * 86_400.0  # seconds after which the row of a writer is removed

flushes = Table(
    "flushes",
    metadata,
    Column("writer", String(40), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("at", Float, nullable=False),
)


class Writer:
    """One process that adds sums to the catalog, one flush after the other. The caller serializes them."""

    def __init__(self) -> None:
        self.id, self.number = secrets.token_hex(16), 0

    def next(self) -> int:
        """The number of a new flush."""
        self.number += 1
        return self.number

    def is_first(self, connection: Connection, number: int) -> bool:
        """Whether no earlier try of this flush was committed. Call it in the transaction that adds the sums."""
        mine, now = flushes.c.writer == self.id, clock(connection)
        found = connection.execute(select(flushes.c.number).where(mine)).scalar()
        if found is None:
            connection.execute(delete(flushes).where(flushes.c.at < now - OLD))
            connection.execute(insert(flushes).values(writer=self.id, number=number, at=now))
        elif found < number:
            connection.execute(update(flushes).where(mine).values(number=number, at=now))
        return found is None or found < number
