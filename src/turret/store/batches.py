"""Batches of requests: their state, and the answers so far. Each belongs to an owner: nobody else sees it.

    validating -> in_progress -> finalizing -> completed
    validating -> failed                in_progress -> cancelling -> cancelled, or expired

One process works on a batch: it claims it for `CLAIMED` seconds by the catalog's clock. Every write of it renews the
claim, or finds that another process has taken over. A claim that nobody renews for that long by a server's own clock
has ended too, so a clock that is set back keeps no batch.

- Tenants take turns, and the tokens of a tenant take turns among each other. A batch that cannot go on is put aside
  until a time, so it holds up no other one.
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
from dataclasses import dataclass, field
from typing import Literal, get_args

from sqlalchemy import ColumnElement, Connection, Row, delete, func, insert, or_, select, update

from turret import audit
from turret.database import Database
from turret.errors import BadRequest, InUse, NotFound, TooLarge
from turret.json_types import JsonMapping, JsonObject
from turret.store.catalog import now as at
from turret.store.catalog import who
from turret.store.client_files import room
from turret.store.client_tables import ENDED, batch_parts, batch_turns, batches, client_files, tenant_of
from turret.store.leases import clock

State = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired"]
CLAIMED = 60.0  # seconds
LONGEST_ASIDE = 60.0  # seconds for which a batch is put aside
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
    notes: JsonMapping | None = None
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


class Lost(Exception):
    """Another process works on the batch now."""


@dataclass
class Batches:
    """The batches of all owners. worker: this process."""

    database: Database
    worker: str = field(default_factory=lambda: secrets.token_hex(8))
    _claims: dict[str, tuple[str, float, float]] = field(default_factory=dict)  # id -> worker, end, when it was seen

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
                tenant, before = tenant_of(owner), {"state": found.state}
                audit.record(connection, "cancel batch", id, None, at=at(), who=who(), before=before, tenant=tenant)
            elif found.state != "cancelling":
                raise InUse(f"batch {found.id} is {found.state}: only one that has not ended can be cancelled")
        return self.find(owner, id)

    # --- the process that works ---------------------------------------------------------------------------------------

    def claim(self) -> Batch | None:
        """A batch that can go on and that no living process works on; None if there is none.

        It is the oldest one of the tenant, and of its token, that waits for its turn longest.
        """
        with self.database.reading() as connection:  # most often there is none: then nobody waits for a writer
            stale = self._stale(connection)
            if not self._free(connection, stale):
                return None
        with self.database.writing() as connection:
            free = self._free(connection, stale)
            if not free:
                return None
            turns = {row.name: row.turn for row in connection.execute(select(batch_turns))}
            owner = min(
                free, key=lambda each: (turns.get(_tenant(each), 0), turns.get(_token(each), 0), free[each], each)
            )
            mine = select(batches).where(self._open(connection, stale), batches.c.owner == owner)
            row = connection.execute(mine.order_by(batches.c.created, batches.c.id).limit(1)).one()
            tries = Counter(_lines(row.unanswered))
            if row.worker not in (None, self.worker):  # that process died
                tries.update([WHOLE_FILE, *row.asking])
            for name in (_tenant(owner), _token(owner)):
                connection.execute(delete(batch_turns).where(batch_turns.c.name == name))
                connection.execute(insert(batch_turns).values(name=name, turn=max(turns.values(), default=0) + 1))
            values = {"worker": self.worker, "until": clock(connection) + CLAIMED, "due": None, "asking": []}
            values["unanswered"] = _texts(tries)
            connection.execute(update(batches).where(batches.c.id == row.id).values(values))
            return _batch(connection.execute(select(batches).where(batches.c.id == row.id)).one())

    def others_wait(self, batch: Batch) -> bool:
        """Whether a batch of another owner could be claimed."""
        with self.database.reading() as connection:
            return any(owner != batch.owner for owner in self._free(connection, self._stale(connection)))

    def renew(self, batch: Batch) -> Batch:
        """Keep the claim. Returns the batch as it is now. Raises Lost."""
        with self.database.writing() as connection:
            self._hold(connection, batch)
            return _batch(connection.execute(select(batches).where(batches.c.id == batch.id)).one())

    def release(self, batch: Batch, aside: float | None = None) -> None:
        """Let a process continue: at once, or after that many seconds. Nothing of the batch may be in flight."""
        mine = (batches.c.id == batch.id) & (batches.c.worker == self.worker)
        with self.database.writing() as connection:
            due = None if aside is None else clock(connection) + min(aside, LONGEST_ASIDE)
            free: JsonObject = {"worker": None, "until": None, "due": due, "asking": []}
            connection.execute(update(batches).where(mine).values(free))

    def begin(self, batch: Batch, total: int) -> Batch:
        """Go from validating to in_progress; a batch that was cancelled meanwhile stays so. Raises Lost."""
        with self.database.writing() as connection:
            self._hold(connection, batch, total=total)
            connection.execute(update(batches).where(batches.c.id == batch.id).values(unanswered={}))
            waiting = (batches.c.id == batch.id) & (batches.c.state == "validating")
            if connection.execute(update(batches).where(waiting).values(state="in_progress")).rowcount:
                _note_time(connection, batch.id, "in_progress")
            return _batch(connection.execute(select(batches).where(batches.c.id == batch.id)).one())

    def keep(self, batch: Batch, answers: Sequence[Answer] = (), asking: Collection[int] = ()) -> Batch:
        """Keep answers, and note all lines that are in flight from now on.

        An answer is kept once: a line that is not unanswered was kept by an earlier try of the same call.

        Raises:
            Lost: another process works on the batch.
            TooLarge: the answers do not fit the owner's space.
        """
        with self.database.writing() as connection:
            self._hold(connection, batch)
            now = _batch(connection.execute(select(batches).where(batches.c.id == batch.id)).one())
            new = {each.line: each for each in answers if each.line in now.unanswered}
            size = now.bytes + sum(len(each.text.encode()) for each in new.values())
            beside = (batches.c.owner == batch.owner) & (batches.c.id != batch.id) & batches.c.state.not_in(ENDED)
            others = select(func.coalesce(func.sum(batches.c.bytes), 0)).where(beside)
            space = room(connection, batch.owner) - int(connection.execute(others).scalar_one())
            if new and size > space:
                raise TooLarge(
                    f"the answers have more than the {space} bytes that your files and batches leave: "
                    "delete some files, and make the batch again"
                )
            rows = [
                {
                    "batch": batch.id,
                    "first": line,
                    "answers": each.text if each.ok else "",
                    "errors": "" if each.ok else each.text,
                }
                for line, each in new.items()
            ]
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
            return _batch(connection.execute(select(batches).where(batches.c.id == batch.id)).one())

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
        with self.database.writing() as connection:
            self.end_in(connection, batch, state, output_file=output_file, error_file=error_file, error=error)

    def end_in(self, connection: Connection, batch: Batch, state: State, **values: str | None) -> None:
        """As `end`, in a transaction that also lists the files."""
        assert state in get_args(State)
        self._hold(connection, batch, state=state, **values)
        free: JsonObject = {"worker": None, "until": None, "unanswered": {}, "asking": []}
        connection.execute(update(batches).where(batches.c.id == batch.id).values(free))
        connection.execute(delete(batch_parts).where(batch_parts.c.batch == batch.id))
        _note_time(connection, batch.id, state)

    def _stale(self, connection: Connection) -> list[str]:
        """The open batches whose claim nobody has renewed for `CLAIMED` seconds of this process's own clock."""
        held = select(batches.c.id, batches.c.worker, batches.c.until).where(
            batches.c.state.not_in(ENDED), batches.c.worker.is_not(None), batches.c.worker != self.worker
        )
        now, found = time.monotonic(), {}
        for row in connection.execute(held):
            seen = self._claims.get(row.id)
            same = seen is not None and seen[:2] == (row.worker, row.until)
            found[row.id] = seen if seen is not None and same else (row.worker, row.until, now)
        self._claims = found
        return [id for id, (_, _, seen) in found.items() if now - seen > CLAIMED]

    def _open(self, connection: Connection, stale: Sequence[str]) -> ColumnElement[bool]:
        """The batches that may be claimed now."""
        now, c = clock(connection), batches.c
        free: ColumnElement[bool] = or_(c.worker.is_(None), c.worker == self.worker, c.until < now, c.id.in_(stale))
        # A time that is further away than any batch is put aside is from before the clock was set back.
        due = or_(c.due.is_(None), c.due <= now, c.due > now + LONGEST_ASIDE + 1, c.state == "cancelling")
        return c.state.not_in(ENDED) & free & due

    def _free(self, connection: Connection, stale: Sequence[str]) -> dict[str, int]:
        """The owners of batches that may be claimed -> when the oldest one was made."""
        query = select(batches.c.owner, func.min(batches.c.created).label("created")).group_by(batches.c.owner)
        return {row.owner: row.created for row in connection.execute(query.where(self._open(connection, stale)))}

    def _hold(self, connection: Connection, batch: Batch, **values: str | int | None) -> None:
        mine = (batches.c.id == batch.id) & (batches.c.worker == self.worker)
        renewed = update(batches).where(mine).values(until=clock(connection) + CLAIMED, **values)
        if connection.execute(renewed).rowcount != 1:
            raise Lost(batch.id)


def _note_time(connection: Connection, id: str, state: State) -> None:
    times = dict(connection.execute(select(batches.c.times).where(batches.c.id == id)).scalar_one())
    times[state] = int(time.time())
    connection.execute(update(batches).where(batches.c.id == id).values(times=times))


def _tenant(owner: str) -> str:
    """The name of the turns of an owner's tenant."""
    return f"tenant {tenant_of(owner)}"


def _token(owner: str) -> str:
    return f"owner {owner}"


def _lines(kept: JsonMapping) -> dict[int, int]:
    """Lines and their tries; JSON has texts as keys."""
    return {int(line): int(tries) for line, tries in kept.items()}


def _texts(lines: Mapping[int, int]) -> dict[str, int]:
    return {str(line): tries for line, tries in lines.items()}


def _batch(row: Row[tuple[str, ...]]) -> Batch:
    kept = {name: value for name, value in row._mapping.items() if name not in ("worker", "until", "due")}
    return Batch(**kept | {"unanswered": _lines(kept["unanswered"])})
