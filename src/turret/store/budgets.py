"""Quotas that all servers of a store share: token buckets in the catalog, which refill evenly.

A server takes requests in small batches, so that a busy token does not write a row for every request. A batch is at
most 1/32 of the remaining requests, so the last ones are taken one by one: over all servers a quota of 10 is 10. A
server gives unused requests back after a second.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Column, Connection, Float, Integer, String, Table, delete, insert, select, update

from turret.database import Database, bytewise, metadata
from turret.store.flushes import Writer
from turret.store.leases import clock

Amount = tuple[str, str, int, float]  # name, unit, limit per minute, amount
BATCH = 32  # a batch is at most 1/32 of the requests that are left
OLD = 3600.0  # seconds after which a bucket that nobody used is removed if it is full

budgets = Table(
    "budgets",
    metadata,
    Column("name", bytewise(255), primary_key=True),
    Column("unit", String(16), primary_key=True),
    Column("per_minute", Integer, nullable=False),
    Column("level", Float, nullable=False),
    Column("at", Float, nullable=False),
)


class Budgets:
    """The shared quotas of one store. Names are those of a token or an adapter, units are requests and tokens."""

    def __init__(self, database: Database) -> None:
        self._database, self.writer = database, Writer()

    def take(self, name: str, unit: str, per_minute: int) -> tuple[int, float]:
        """Take a batch. Returns how many, and if there is none, the seconds until there is one."""
        with self._database.writing() as connection:
            level = _level(connection, name, unit, per_minute)
            if level < 1 - 1e-9:
                return 0, (1 - level) * 60 / per_minute
            count = max(1, int(level / BATCH))
            _change(connection, name, unit, -count)
            return count, 0.0

    def change(self, amounts: Iterable[Amount], number: int) -> dict[tuple[str, str], float]:
        """Add amounts, negative ones to charge tokens. Returns the levels after that, by name and unit.

        Args:
            number: of this flush, from `writer.next()`; the same one adds the amounts once.
        """
        levels = {}
        with self._database.writing() as connection:
            first = self.writer.is_first(connection, number)
            for name, unit, per_minute, wanted in amounts:
                amount = wanted if first else 0.0
                level = _level(connection, name, unit, per_minute)
                _change(connection, name, unit, min(amount, per_minute - level))
                levels[name, unit] = min(level + amount, per_minute)
            late = (budgets.c.at < clock(connection) - OLD) & (budgets.c.level >= 0)
            connection.execute(delete(budgets).where(late))
        return levels


def _level(connection: Connection, name: str, unit: str, per_minute: int) -> float:
    """Refill a bucket up to now, and return its level. A new one, or one with another limit, is full."""
    chosen, now = (budgets.c.name == name) & (budgets.c.unit == unit), clock(connection)
    row = connection.execute(select(budgets).where(chosen)).first()
    if row is None or row.per_minute != per_minute:
        connection.execute(delete(budgets).where(chosen))
        values = {"name": name, "unit": unit, "per_minute": per_minute, "level": float(per_minute), "at": now}
        connection.execute(insert(budgets).values(values))
        return float(per_minute)
    level: float = min(float(per_minute), row.level + max(0.0, now - row.at) * per_minute / 60)
    connection.execute(update(budgets).where(chosen).values(level=level, at=now))
    return level


def _change(connection: Connection, name: str, unit: str, amount: float) -> None:
    chosen = (budgets.c.name == name) & (budgets.c.unit == unit)
    connection.execute(update(budgets).where(chosen).values(level=budgets.c.level + amount))
