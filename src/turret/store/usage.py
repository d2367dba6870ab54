"""Usage: requests and tokens by tenant, adapter and UTC day.

A server adds up what it answers, and writes the sums every `SECONDS`, and when it ends. So a killed server loses what
it answered in that time, and one that is stopped by SIGTERM nothing. While the store cannot be reached the sums grow.
A flush that is tried again is counted once (`turret.store.usage`). A server of a read-only store counts nothing.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, Connection, Row, delete, or_, select, tuple_, update

from turret.database import (
    LONGEST_NAME,
    Database,
    access_of,
    budgets,
    flushes,
    seen_names,
    upsert,
    usage,
)
from turret.json_types import AsJson, JsonObject
from turret.store.leases import clock

# --- flushes ----------------------------------------------------------------------------------------------------------
# Sums that a process adds to the catalog again after an error are added once.
#
# The answer to a COMMIT may be lost, so a process that got an error does not know whether its sums were added. It keeps
# what it wanted to add under a number, and tries again with the same number. The transaction that adds the sums moves
# the writer's number on; if it finds that number there, an earlier try was committed.


OLD = 30 * 86_400.0  # seconds after which the row of a writer is removed


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
        now = clock(connection)
        if number == 1:
            connection.execute(delete(flushes).where(flushes.c.at < now - OLD))
        upsert(connection, flushes, [{"writer": self.id, "number": 0, "at": now}], change=None)
        older = (flushes.c.writer == self.id) & (flushes.c.number < number)  # waits for an earlier try that still ends
        return connection.execute(update(flushes).where(older).values(number=number, at=now)).rowcount == 1


# --- usage ------------------------------------------------------------------------------------------------------------


SECONDS = 2.0  # between two writes of a server
BASE = ""  # the adapter of the bare base

COUNTS = ("requests", "answers", "prompt_tokens", "completion_tokens")
COLUMNS = ("tenant", "adapter", "day", *COUNTS)


@dataclass(frozen=True)
class Usage(AsJson):
    """What one adapter of a tenant answered on one day."""

    tenant: str
    adapter: str  # empty for the bare base
    day: str  # 2026-11-27, in UTC
    requests: int
    answers: int  # a request with many inputs has many
    prompt_tokens: int
    completion_tokens: int


class UsageLog:
    """The usage of one server that is not in the store yet. Safe to use from several threads.

    Args:
        clock: returns seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._sums: dict[tuple[str, str, str], list[int]] = {}
        self._writer, self._unsure = Writer(), dict[tuple[str, str, str], list[int]]()  # of the flush that is tried
        self.counts = database.writable()

    def add(self, tenant: str, adapter: str, answers: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Count one request of today."""
        if not self.counts:
            return
        key = tenant, adapter[:LONGEST_NAME], datetime.fromtimestamp(self._clock(), UTC).date().isoformat()
        with self._lock:
            self._add(key, [1, answers, prompt_tokens, completion_tokens])

    def flush(self) -> None:
        """Write what was counted. Raises StoreError; the next flush then tries the same sums again first."""
        with self._writing:
            if self._unsure:
                self._write(self._writer.number)
            with self._lock:
                self._unsure, self._sums = self._sums, {}
            if self._unsure:
                self._write(self._writer.next())

    def _write(self, number: int) -> None:
        with self._database.adding() as connection:
            if self._writer.is_first(connection, number):
                sums: list[JsonObject] = [
                    dict(zip(COLUMNS, (*key, *counts), strict=True)) for key, counts in sorted(self._unsure.items())
                ]
                upsert(connection, usage, sums, change="add")
        self._unsure = {}

    def _add(self, key: tuple[str, str, str], counts: list[int]) -> None:
        known = self._sums.setdefault(key, [0] * len(COUNTS))
        self._sums[key] = [a + b for a, b in zip(known, counts, strict=True)]


def read_usage(database: Database, since: str | None = None, until: str | None = None) -> Sequence[Usage]:
    """The usage that may be seen, by adapter and day.

    Args:
        since, until: the first and the last day, such as `2026-11-27`.
    """
    with database.reading() as connection:
        query = select(*(usage.c[column] for column in COLUMNS)).where(_seen_usage(connection))
        if since is not None:
            query = query.where(usage.c.day >= since)
        if until is not None:
            query = query.where(usage.c.day <= until)
        rows = connection.execute(query.order_by(usage.c.adapter, usage.c.day))
        return [Usage(*row) for row in rows]


def _seen_usage(connection: Connection) -> ColumnElement[bool]:
    access = access_of(connection)
    own = usage.c.tenant == access.tenant
    if access.whole:
        return own
    seen = usage.c.adapter.in_(seen_names(connection))
    return own & (or_(seen, usage.c.adapter == BASE) if "*" in access.bases else seen)


# --- budgets ----------------------------------------------------------------------------------------------------------
# Quotas that all servers of a store share: token buckets in the catalog, which refill evenly.
#
# A server takes requests in small batches, so that a busy token does not write a row for every request. A batch is at
# most 1/32 of the remaining requests, so the last ones are taken one by one: over all servers a quota of 10 is 10. A
# server gives unused requests back after a second.


Key = tuple[str, str]  # name, unit
Amount = tuple[str, str, int, float]  # name, unit, limit per minute, amount
AT_ONCE = 500  # buckets in one query
BATCH = 32  # a batch is at most 1/32 of the requests that are left
UNUSED_BUCKET = 3600.0  # seconds after which a bucket that nobody used is removed if it is full


class Budgets:
    """The shared quotas of one store. Names are those of a token or an adapter, units are requests and tokens."""

    def __init__(self, database: Database) -> None:
        self._database, self.writer = database, Writer()

    def take(self, name: str, unit: str, per_minute: int) -> tuple[int, float]:
        """Take a batch. Returns how many, and if there is none, the seconds until there is one."""
        key = name, unit
        with self._database.adding() as connection:
            levels, now = _levels(connection, {key: per_minute})
            if (level := levels[key]) < 1 - 1e-9:
                return 0, (1 - level) * 60 / per_minute
            count = max(1, int(level / BATCH))
            upsert(connection, budgets, _rows({key: level - count}, {key: per_minute}, now), change="set")
            return count, 0.0

    def change(self, amounts: Iterable[Amount], number: int) -> dict[Key, float]:
        """Add amounts, negative ones to charge tokens. Returns the levels after that.

        Args:
            number: of this flush, from `writer.next()`; the same one adds the amounts once.
        """
        wanted = list(amounts)
        limits = {(name, unit): per_minute for name, unit, per_minute, _ in wanted}
        with self._database.adding() as connection:
            first = self.writer.is_first(connection, number)
            levels, now = _levels(connection, limits)
            if first:
                for name, unit, per_minute, amount in wanted:
                    levels[name, unit] = min(levels[name, unit] + amount, per_minute)
            upsert(connection, budgets, _rows(levels, limits, now), change="set")
            late = (budgets.c.at < now - UNUSED_BUCKET) & (budgets.c.level >= 0)
            unused = select(budgets.c.name, budgets.c.unit).where(late).with_for_update(skip_locked=True)
            connection.execute(delete(budgets).where(tuple_(budgets.c.name, budgets.c.unit).in_(unused)))
        return levels


def _levels(connection: Connection, limits: Mapping[Key, int]) -> tuple[dict[Key, float], float]:
    """The levels of buckets, refilled up to now, and now. A new one, or one with another limit per minute, is full.

    Their rows are locked until the transaction ends, so that no other process changes them.
    """
    levels, keys = {key: float(limit) for key, limit in limits.items()}, sorted(limits)
    upsert(connection, budgets, _rows(levels, limits, clock(connection)), change=None)
    found: list[Row[tuple[str, ...]]] = []
    for start in range(0, len(keys), AT_ONCE):
        chosen = tuple_(budgets.c.name, budgets.c.unit).in_(keys[start : start + AT_ONCE])
        locked = select(budgets).where(chosen).order_by(budgets.c.name, budgets.c.unit).with_for_update()
        found += connection.execute(locked).all()
    now = clock(connection)  # after the wait for others
    for row in found:
        limit = limits[row.name, row.unit]
        if row.per_minute == limit:
            levels[row.name, row.unit] = min(limit, row.level + max(0.0, now - row.at) * limit / 60)
    return levels, now


def _rows(levels: Mapping[Key, float], limits: Mapping[Key, int], now: float) -> list[JsonObject]:
    columns = ("name", "unit", "per_minute", "level", "at")
    return [dict(zip(columns, (*key, limits[key], level, now), strict=True)) for key, level in sorted(levels.items())]
