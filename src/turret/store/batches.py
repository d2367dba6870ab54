"""Batches of requests: their state, and the answers so far. Each belongs to an owner: nobody else sees it.

    validating -> in_progress -> completed
    validating -> failed                in_progress -> cancelling -> cancelled, or expired

A batch is a job (`turret.store.jobs`): one process has its lease and works on it, and every write of it checks that
lease. Tenants take turns, and so do the tokens of a tenant. A batch that cannot go on is put aside until a time, so it
holds up no other one.

- Lines are taken from the file in order. `unanswered` has those that were taken and have no answer; an answer is kept
  in the transaction that removes its line there. So no line is kept twice, also if the answer of a COMMIT is lost.
- `asking` has the lines in flight. If their server dies, each has lost a try. A line that has lost one is asked alone,
  and one that has lost `MOST_TRIES` is not asked again.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from sqlalchemy import Connection, Row, delete, func, insert, select, tuple_, update

from turret import audit
from turret.access import DEFAULT
from turret.database import BATCH, Database, batch_parts, batches, jobs
from turret.errors import BadRequest, InUse, LeaseLost, NotFound, TooLarge
from turret.json_types import JsonMapping, JsonObject
from turret.store import leases
from turret.store.catalog import now as at
from turret.store.catalog import who
from turret.store.client_files import ENDED, find_file, room_left, tenant_of
from turret.store.jobs import Ended, Job, JobQueue, add_job, end_job

if TYPE_CHECKING:
    from turret.store.core import Store

State = Literal["validating", "in_progress", "completed", "failed", "cancelling", "cancelled", "expired"]
MOST_TRIES = 3  # of a line, each lost by a server that died while it asked the line
WHOLE_FILE = -1  # stands for the batch itself, among the lines that have lost tries
LASTS = 24 * 3600  # seconds until a batch expires
PARTS = 16  # answers that are in memory at a time when a batch ends
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
    notes: Mapping[str, str] | None = None
    error: str | None = None
    total: int = 0
    done: int = 0  # lines, answered or failed
    failed: int = 0
    taken: int = 0  # lines before this one were taken from the file; its first line is 0
    unanswered: Mapping[int, int] = field(default_factory=dict)  # lines that were taken -> tries that were lost
    asking: Sequence[int] = ()  # lines in flight
    bytes: int = 0  # of all answers

    @property
    def expires(self) -> int:
        return self.created + LASTS

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class Answer:
    """The answer of one line, as a line of the file of answers or, if it is none, of that of errors."""

    line: int
    text: str
    ok: bool


@dataclass
class Batches:
    """The batches of all owners, and those that this process has."""

    database: Database
    queue: JobQueue
    _taken: dict[str, Job] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store) -> Batches:
        """The batches of a store, which is made if it does not exist."""
        return cls(store.database(make=True), JobQueue.of(store))

    # --- owners -------------------------------------------------------------------------------------------------------

    def add(self, owner: str, endpoint: str, input_file: str, notes: Mapping[str, str] | None) -> Batch:
        """Queue a batch. Raises NotFound for a file that is not the owner's, BadRequest for too many open batches."""
        now, id = int(time.time()), f"batch_{secrets.token_hex(12)}"
        with self.database.writing() as connection:
            find_file(connection, owner, input_file)
            mine = select(func.count()).where(batches.c.owner == owner, batches.c.state.not_in(ENDED))
            if int(connection.execute(mine).scalar_one()) >= MOST_OPEN:
                raise BadRequest(f"{MOST_OPEN} of your batches have not ended: wait for them, or cancel some")
            row: JsonObject = {"id": id, "owner": owner, "state": "validating", "endpoint": endpoint, "notes": notes}
            row |= {"input_file": input_file, "created": now, "times": {}, "total": 0, "done": 0, "failed": 0}
            connection.execute(insert(batches).values(row))
            add_job(connection, BATCH, id, tenant_of(owner) or DEFAULT, owner=owner)
            after = {"endpoint": endpoint, "input_file": input_file}
            audit.record(connection, "batch", id, None, at=at(), who=who(), after=after, tenant=tenant_of(owner))
        return self.find(owner, id)

    def find(self, owner: str, id: str) -> Batch:
        """One batch of an owner. Raises NotFound, also for a batch of somebody else."""
        query = select(batches).where(batches.c.id == id, batches.c.owner == owner)
        with self.database.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFound(f"no batch {ascii(id)[:60]}: GET /v1/batches lists yours")
        return _batch(row)

    def list_batches(self, owner: str, *, after: str | None = None, limit: int = 20) -> Sequence[Batch]:
        """The newest batches of an owner, those after another one of them."""
        query = select(batches).where(batches.c.owner == owner)
        if after is not None:
            last = self.find(owner, after)
            query = query.where(tuple_(batches.c.created, batches.c.id) < (last.created, last.id))
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
                connection.execute(update(jobs).where(jobs.c.id == found.id).values(cancelled=at(), due=0.0))
                tenant, before = tenant_of(owner), {"state": found.state}
                audit.record(connection, "cancel batch", id, None, at=at(), who=who(), before=before, tenant=tenant)
            elif found.state != "cancelling":
                raise InUse(f"batch {found.id} is {found.state}: only one that has not ended can be cancelled")
        return self.find(owner, id)

    # --- the process that works ---------------------------------------------------------------------------------------

    def claim(self) -> Batch | None:
        """Take a batch that can go on and that no living process works on; None if there is none."""
        found: list[Batch] = []

        def read(connection: Connection, taken: Job) -> None:
            row = _read_batch(connection, taken.id)
            tries = Counter(row.unanswered)
            if taken.died:
                tries.update([WHOLE_FILE, *row.asking])
            values = {"unanswered": _texts(tries), "asking": []}
            connection.execute(update(batches).where(batches.c.id == taken.id).values(values))
            found[:] = [replace(row, unanswered=dict(tries), asking=[])]

        if (taken := self.queue.take(kinds=(BATCH,), also=read)) is None:
            return None
        self._taken[taken.id] = taken
        return found[0]

    def others_wait(self, batch: Batch) -> bool:
        """Whether a batch of another owner could be claimed."""
        return self.queue.others_wait((BATCH,), batch.owner)

    def renew(self, batch: Batch) -> Batch:
        """Renew the lease. Returns the batch as it is now. Raises LeaseLost."""
        with self.database.writing() as connection:
            self._hold(connection, batch)
            leases.renew(connection, self._taken[batch.id].lease)
            return _read_batch(connection, batch.id)

    def release(self, batch: Batch, aside: float = 0.0) -> None:
        """Let a process continue: at once, or after that many seconds. Nothing of the batch may be in flight."""
        if (taken := self._taken.pop(batch.id, None)) is None:
            return
        try:
            with self.database.writing() as connection:
                taken.lease.require_owner(connection)
                connection.execute(update(batches).where(batches.c.id == batch.id).values(asking=[]))
            self.queue.put_aside(taken, aside)
        except LeaseLost:
            return
        except BaseException:  # an outage
            leases.give_up(taken.lease)
            raise

    def begin(self, batch: Batch, total: int) -> Batch:
        """Go from validating to in_progress; a batch that was cancelled meanwhile stays so. Raises LeaseLost."""
        with self.database.writing() as connection:
            self._hold(connection, batch)
            connection.execute(update(batches).where(batches.c.id == batch.id).values(total=total, unanswered={}))
            waiting = (batches.c.id == batch.id) & (batches.c.state == "validating")
            if connection.execute(update(batches).where(waiting).values(state="in_progress")).rowcount:
                _note_time(connection, batch.id, "in_progress")
            return _read_batch(connection, batch.id)

    def keep(self, batch: Batch, answers: Sequence[Answer] = (), asking: Collection[int] = ()) -> Batch:
        """Keep answers, and note all lines that are in flight from now on.

        An answer is kept once: a line that is not unanswered was kept by an earlier try of the same call.

        Raises:
            LeaseLost: another process works on the batch.
            TooLarge: the answers do not fit the owner's space.
        """
        with self.database.writing() as connection:
            self._hold(connection, batch)
            now = _read_batch(connection, batch.id)
            new = {each.line: each for each in answers if each.line in now.unanswered}
            size = now.bytes + sum(len(each.text.encode()) for each in new.values())
            beside = (batches.c.owner == batch.owner) & (batches.c.id != batch.id) & batches.c.state.not_in(ENDED)
            others = select(func.coalesce(func.sum(batches.c.bytes), 0)).where(beside)
            space = room_left(connection, batch.owner) - int(connection.execute(others).scalar_one())
            if new and size > space:
                raise TooLarge(
                    f"the answers have more than the {space} bytes that your files and batches leave: "
                    "delete some files, and make the batch again"
                )
            rows = []
            for line, each in new.items():
                answer, error = (each.text, "") if each.ok else ("", each.text)
                rows.append({"batch": batch.id, "first": line, "answers": answer, "errors": error})
            if rows:
                connection.execute(insert(batch_parts), rows)
            tries = dict.fromkeys((line for line in asking if line >= now.taken), 0) | dict(now.unanswered)
            values = {
                "done": now.done + len(new),
                "failed": now.failed + sum(not each.ok for each in new.values()),
                "bytes": size,
                "taken": max([now.taken, *(line + 1 for line in asking)]),
                "unanswered": _texts({line: lost for line, lost in tries.items() if line not in new}),
                "asking": sorted(asking),
            }
            connection.execute(update(batches).where(batches.c.id == batch.id).values(values))
            return _read_batch(connection, batch.id)

    def parts(self, batch: Batch) -> Iterator[Answer]:
        """All answers so far, in the order of the lines, a few in memory at a time."""
        last = -1
        while True:
            query = select(batch_parts).where(batch_parts.c.batch == batch.id, batch_parts.c.first > last)
            with self.database.reading() as connection:
                rows = connection.execute(query.order_by(batch_parts.c.first).limit(PARTS)).all()
            if not rows:
                return
            last = rows[-1].first
            for row in rows:
                if row.answers:
                    yield Answer(row.first, row.answers, ok=True)
                if row.errors:
                    yield Answer(row.first, row.errors, ok=False)

    def end(self, batch: Batch, state: State, **values: str | None) -> None:
        """End a batch, and drop the parts that its files hold now. values: files and error. Raises LeaseLost."""
        with self.database.writing() as connection:
            self.end_in(connection, batch, state, **values)

    def end_in(self, connection: Connection, batch: Batch, state: State, **values: str | None) -> None:
        """As `end`, in a transaction that also lists the files."""
        assert state in get_args(State)
        self._hold(connection, batch)
        row: JsonObject = {"state": state, "unanswered": {}, "asking": [], **values}
        connection.execute(update(batches).where(batches.c.id == batch.id).values(row))
        connection.execute(delete(batch_parts).where(batch_parts.c.batch == batch.id))
        _note_time(connection, batch.id, state)
        ended: Ended = "failed" if state == "failed" else "cancelled" if state == "cancelled" else "finished"
        end_job(connection, batch.id, ended, values.get("error"), self._taken[batch.id].lease)

    def _hold(self, connection: Connection, batch: Batch) -> None:
        taken = self._taken.get(batch.id)
        if taken is None:
            raise LeaseLost(f"batch {batch.id} has ended, or another process works on it")
        taken.lease.require(connection)


def _note_time(connection: Connection, id: str, state: State) -> None:
    times = dict(connection.execute(select(batches.c.times).where(batches.c.id == id)).scalar_one())
    times[state] = int(time.time())
    connection.execute(update(batches).where(batches.c.id == id).values(times=times))


def _texts(lines: Mapping[int, int]) -> dict[str, int]:
    """Lines and their tries for JSON, which has texts as keys."""
    return {str(line): tries for line, tries in lines.items()}


def _read_batch(connection: Connection, id: str) -> Batch:
    return _batch(connection.execute(select(batches).where(batches.c.id == id)).one())


def _batch(row: Row[tuple[str, ...]]) -> Batch:
    lines = {int(line): int(tries) for line, tries in row.unanswered.items()}
    return Batch(**dict(row._mapping) | {"unanswered": lines})
