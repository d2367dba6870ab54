"""Usage: requests and tokens by tenant, adapter and UTC day.

A server adds up what it answers, and writes the sums every `SECONDS`, and when it ends. So a killed server loses what
it answered in that time, and one that is stopped by SIGTERM nothing. While the store cannot be reached the sums grow.
A flush that is tried again is counted once (`turret.store.flushes`). A server of a read-only store counts nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from sqlalchemy import BigInteger, Column, ColumnElement, Connection, String, Table, and_, insert, or_, select, update

from turret.database import Database, adapters, bytewise, metadata
from turret.json_types import JsonObject
from turret.store.flushes import Writer
from turret.visibility import access_of, seen_adapters

SECONDS = 2.0  # between two writes of a server
BASE = ""  # the adapter of the bare base
LONGEST = 100  # characters of an adapter's name; what names several adapters may be longer, and is cut

usage = Table(
    "usage",
    metadata,
    Column("tenant", bytewise(64), primary_key=True),
    Column("adapter", bytewise(LONGEST), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("answers", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
)
COUNTS = ("requests", "answers", "prompt_tokens", "completion_tokens")
COLUMNS = ("tenant", "adapter", "day", *COUNTS)


@dataclass(frozen=True)
class Usage:
    """What one adapter of a tenant answered on one day."""

    tenant: str
    adapter: str  # empty for the bare base
    day: str  # 2026-11-27, in UTC
    requests: int
    answers: int  # a request with many inputs has many
    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> JsonObject:
        return asdict(self)


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
        key = tenant, adapter[:LONGEST], datetime.fromtimestamp(self._clock(), UTC).date().isoformat()
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
        with self._database.writing() as connection:
            if self._writer.is_first(connection, number):
                for key, counts in sorted(self._unsure.items()):
                    _count(connection, key, counts)
        self._unsure = {}

    def _add(self, key: tuple[str, str, str], counts: list[int]) -> None:
        known = self._sums.setdefault(key, [0] * len(COUNTS))
        self._sums[key] = [a + b for a, b in zip(known, counts, strict=True)]


def _count(connection: Connection, key: tuple[str, str, str], counts: list[int]) -> None:
    """Add to a row, in a transaction that is the only writer."""
    named, values = dict(zip(COLUMNS, key, strict=False)), dict(zip(COUNTS, counts, strict=True))
    row = and_(*(usage.c[column] == value for column, value in named.items()))
    more = {column: usage.c[column] + value for column, value in values.items()}
    if connection.execute(update(usage).where(row).values(more)).rowcount == 0:
        connection.execute(insert(usage).values(named | values))


def read(database: Database, since: str | None = None, until: str | None = None) -> Sequence[Usage]:
    """The usage that may be seen, by adapter and day.

    Args:
        since, until: the first and the last day, such as `2026-11-27`.
    """
    with database.reading() as connection:
        query = select(*(usage.c[column] for column in COLUMNS)).where(_seen(connection))
        if since is not None:
            query = query.where(usage.c.day >= since)
        if until is not None:
            query = query.where(usage.c.day <= until)
        rows = connection.execute(query.order_by(usage.c.adapter, usage.c.day))
        return [Usage(*row) for row in rows]


def _seen(connection: Connection) -> ColumnElement[bool]:
    access = access_of(connection)
    own = usage.c.tenant == access.tenant
    if access.whole:
        return own
    seen = usage.c.adapter.in_(select(adapters.c.name).where(seen_adapters(connection)))
    return own & (or_(seen, usage.c.adapter == BASE) if "*" in access.bases else seen)
