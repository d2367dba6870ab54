"""Batches of requests: their state, and the answers so far. Each belongs to an owner: nobody else sees it.

    validating -> in_progress -> finalizing -> completed
    validating -> failed                in_progress -> cancelling -> cancelled, or expired

One process works on a batch: it claims it for `CLAIMED` seconds by the catalog's clock. Every write of it renews the
claim, or finds that another process has taken over. Answers are kept with the count of lines that they bring the batch
to, in one transaction. So a batch continues after a kill where it was, and no line is answered twice.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, update

from turret.database import Database
from turret.errors import BadRequest, InUse, NotFound
from turret.json_types import JsonMapping, JsonObject
from turret.store.client_tables import batch_parts, batches, client_files
from turret.store.leases import clock

State = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired"
]  # fmt: skip
ENDED = ("completed", "failed", "cancelled", "expired")
CLAIMED = 60.0  # seconds
LASTS = 24 * 3600  # seconds until a batch expires
MOST_OPEN = 100  # batches of one owner that have not ended


@dataclass(frozen=True)
class Batch:
    """A batch of an owner. times: state -> seconds since 1970 when it was reached."""

    id: str
    owner: str
    state: State
    endpoint: str
    input_file: str
    created: int
    times: JsonMapping
    output_file: str | None = None
    error_file: str | None = None
    notes: JsonMapping | None = None
    error: str | None = None
    total: int = 0
    done: int = 0  # lines, answered or failed
    failed: int = 0

    @property
    def expires(self) -> int:
        return self.created + LASTS

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Lost(Exception):
    """Another process works on the batch, or its owner deleted it."""


@dataclass(frozen=True)
class Part:
    """Answers and errors of some lines, as JSON lines."""

    answers: str = ""
    errors: str = ""
    lines: int = 0
    failed: int = 0


@dataclass
class Batches:
    """The batches of all owners. worker: this process."""

    database: Database
    worker: str = field(default_factory=lambda: secrets.token_hex(8))

    # --- owners -------------------------------------------------------------------------------------------------------

    def add(self, owner: str, endpoint: str, input_file: str, notes: JsonMapping | None) -> Batch:
        """Queue a batch. Raises NotFound for a file that is not the owner's, BadRequest for too many open batches."""
        now, id = int(time.time()), f"batch_{secrets.token_hex(12)}"
        with self.database.writing() as connection:
            file = select(client_files.c.id).where(client_files.c.id == input_file, client_files.c.owner == owner)
            if connection.execute(file).first() is None:
                raise NotFound(f"no file {ascii(input_file)[:60]}: GET /v1/files lists yours")
            mine = select(func.count()).where(batches.c.owner == owner, batches.c.state.not_in(ENDED))
            if int(connection.execute(mine).scalar_one()) >= MOST_OPEN:
                raise BadRequest(f"{MOST_OPEN} of your batches have not ended: wait for them, or cancel some")
            row: JsonObject = {"id": id, "owner": owner, "state": "validating", "endpoint": endpoint, "notes": notes}
            row |= {"input_file": input_file, "created": now, "times": {}, "total": 0, "done": 0, "failed": 0}
            connection.execute(insert(batches).values(row))
        return self.find(owner, id)

    def find(self, owner: str, id: str) -> Batch:
        """One batch of an owner. Raises NotFound, also for a batch of somebody else."""
        query = select(batches).where(batches.c.id == id, batches.c.owner == owner)
        with self.database.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFound(f"no batch {ascii(id)[:60]}: GET /v1/batches lists yours")
        return _batch(row)

    def listed(self, owner: str, *, after: str | None = None, limit: int = 20) -> Sequence[Batch]:
        """The newest batches of an owner, those after another one of them."""
        query = select(batches).where(batches.c.owner == owner)
        if after is not None:
            last = self.find(owner, after)
            same = (batches.c.created == last.created) & (batches.c.id < last.id)
            query = query.where((batches.c.created < last.created) | same)
        query = query.order_by(batches.c.created.desc(), batches.c.id.desc()).limit(limit)
        with self.database.reading() as connection:
            return [_batch(row) for row in connection.execute(query)]

    def cancel(self, owner: str, id: str) -> Batch:
        """Ask a batch to end. Raises InUse for one that has ended."""
        found = self.find(owner, id)
        with self.database.writing() as connection:
            open_ = (batches.c.id == found.id) & batches.c.state.in_(("validating", "in_progress"))
            changed = connection.execute(update(batches).where(open_).values(state="cancelling"))
            if changed.rowcount:
                _note_time(connection, found.id, "cancelling")
            elif found.state != "cancelling":
                raise InUse(f"batch {found.id} is {found.state}: only one that has not ended can be cancelled")
        return self.find(owner, id)

    def uses(self, id: str) -> bool:
        """Whether a batch that has not ended reads this file."""
        query = select(batches.c.id).where(batches.c.input_file == id, batches.c.state.not_in(ENDED))
        with self.database.reading() as connection:
            return connection.execute(query).first() is not None

    # --- the process that works ---------------------------------------------------------------------------------------

    def claim(self) -> Batch | None:
        """The oldest open batch that no living process works on; None if there is none."""
        with self.database.reading() as connection:  # most often there is none: then nobody waits for a writer
            if self._oldest(connection) is None:
                return None
        with self.database.writing() as connection:
            id = self._oldest(connection)
            if id is None:
                return None
            values = {"worker": self.worker, "until": clock(connection) + CLAIMED}
            connection.execute(update(batches).where(batches.c.id == id).values(values))
            return _batch(connection.execute(select(batches).where(batches.c.id == id)).one())

    def renew(self, batch: Batch) -> Batch:
        """Keep the claim. Returns the batch as it is now. Raises Lost."""
        with self.database.writing() as connection:
            self._hold(connection, batch)
            return _batch(connection.execute(select(batches).where(batches.c.id == batch.id)).one())

    def release(self, batch: Batch) -> None:
        """Let another process continue at once."""
        mine = (batches.c.id == batch.id) & (batches.c.worker == self.worker)
        with self.database.writing() as connection:
            connection.execute(update(batches).where(mine).values(worker=None, until=None))

    def begin(self, batch: Batch, total: int) -> Batch:
        """Go from validating to in_progress; a batch that was cancelled meanwhile stays so. Raises Lost."""
        with self.database.writing() as connection:
            self._hold(connection, batch, total=total)
            waiting = (batches.c.id == batch.id) & (batches.c.state == "validating")
            if connection.execute(update(batches).where(waiting).values(state="in_progress")).rowcount:
                _note_time(connection, batch.id, "in_progress")
            return _batch(connection.execute(select(batches).where(batches.c.id == batch.id)).one())

    def keep(self, batch: Batch, part: Part) -> Batch:
        """Keep the answers of the next lines. Raises Lost."""
        with self.database.writing() as connection:
            done, failed = batch.done + part.lines, batch.failed + part.failed
            self._hold(connection, batch, done=done, failed=failed)
            row = {"batch": batch.id, "first": batch.done, "answers": part.answers, "errors": part.errors}
            connection.execute(insert(batch_parts).values(row))
            return _batch(connection.execute(select(batches).where(batches.c.id == batch.id)).one())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """All answers so far, in the order of the lines, one part in memory at a time."""
        first = -1
        while True:
            query = select(batch_parts).where(batch_parts.c.batch == batch.id, batch_parts.c.first > first)
            with self.database.reading() as connection:
                row = connection.execute(query.order_by(batch_parts.c.first).limit(1)).first()
            if row is None:
                return
            first = row.first
            yield Part(row.answers, row.errors)

    def end(
        self,
        batch: Batch,
        state: State,
        *,
        output_file: str | None = None,
        error_file: str | None = None,
        error: str | None = None,
    ) -> None:
        """End a batch, and drop the parts that its files hold now. Raises Lost."""
        assert state in get_args(State)
        with self.database.writing() as connection:
            self._hold(connection, batch, state=state, output_file=output_file, error_file=error_file, error=error)
            free = {"worker": None, "until": None}
            connection.execute(update(batches).where(batches.c.id == batch.id).values(free))
            connection.execute(delete(batch_parts).where(batch_parts.c.batch == batch.id))
            _note_time(connection, batch.id, state)

    def _oldest(self, connection: Connection) -> str | None:
        """The oldest open batch that may be claimed."""
        free = or_(batches.c.worker.is_(None), batches.c.worker == self.worker, batches.c.until < clock(connection))
        query = select(batches.c.id).where(batches.c.state.not_in(ENDED), free)
        found: str | None = connection.execute(query.order_by(batches.c.created, batches.c.id).limit(1)).scalar()
        return found

    def _hold(self, connection: Connection, batch: Batch, **values: str | int | None) -> None:
        mine = (batches.c.id == batch.id) & (batches.c.worker == self.worker)
        renewed = update(batches).where(mine).values(until=clock(connection) + CLAIMED, **values)
        if connection.execute(renewed).rowcount != 1:
            raise Lost(batch.id)


def _note_time(connection: Connection, id: str, state: State) -> None:
    times = dict(connection.execute(select(batches.c.times).where(batches.c.id == id)).scalar_one())
    times[state] = int(time.time())
    connection.execute(update(batches).where(batches.c.id == id).values(times=times))


def _batch(row: Row[tuple[str, ...]]) -> Batch:
    kept = {name: value for name, value in row._mapping.items() if name not in ("worker", "until")}
    return Batch(**kept)
