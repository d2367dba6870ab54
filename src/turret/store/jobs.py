"""The jobs of a store: what waits, who is next, and what happens after each try.

A job is a row of `jobs`, and its process holds the lease `jobs/<id>` (`turret.store.leases`). Its kind is:

- training: makes a version; see `turret.store.runs`
- cell: a training or a measurement of a comparison, a control study or a sweep
- study: conducts a comparison or a sweep: submits its cells, waits for them and judges them; see
  `turret.workspace.studying`. What it has found so far is in its `result`
- batch: requests of a client; see `turret.store.batches`

A job with the time `queued` is from the queue: any worker that takes its kind may take it. Others belong to the process
that began them, such as a `turret train`. A job has a state:

- waiting: any worker may take it, once it is due
- running: a worker has its lease. If the lease ends, another worker takes it
- interrupted: it is not from the queue, and the same command goes on with it
- finished, failed, cancelled: it has ended

A worker takes the next job in a transaction that writes. There is one such transaction at a time, on PostgreSQL too, so
no two workers take the same job and none waits for a row that another one has.

Who is next: of the tenants that may run one more job, the one with the fewest running ones, then the one whose last
turn is longest ago. Of its owners, whose last turn is longest ago. Of these jobs: the highest priority, then the
oldest. So a tenant with a thousand waiting jobs delays the others by one job at most, and priorities order the jobs of
one tenant only. Batches have turns of their own, in `job_turns`.

A job is tried three times at most. A try that a worker returns, because it was stopped, does not count, nor does one
that an outage of the store's own places has ended. If a process dies that ran several jobs, nobody knows which of them
ended it: no try is counted, and each is next tried alone. Who takes a batch counts its tries itself.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, final

from sqlalchemy import ColumnElement, Connection, func, insert, or_, select, update

from turret import audit
from turret.access import DEFAULT
from turret.database import (
    BATCH,
    CELL,
    OPEN_STATES,
    STUDY,
    TRAINING,
    Database,
    access_of,
    job_turns,
    jobs,
    queue_limits,
    run_log,
    seen_runs,
    upsert,
)
from turret.database import leases as lease_rows
from turret.errors import InUse, NotFound, QueueFull, RecipeError
from turret.json_types import AsJson, JsonMapping, JsonObject, JsonValue, Plain
from turret.postgres import plain_text
from turret.store import leases
from turret.store.blobs import digest_of
from turret.store.catalog import now, plain, who
from turret.store.leases import Lease
from turret.store.runs import HELD, HeldRun, TrainingRuns, new_id

if TYPE_CHECKING:
    from turret.store.core import Store

WORK = (TRAINING, CELL)  # what a worker takes
STUDY_ID = "study-"  # begins the id of a study
TRIES = 3
MOST_WAITING = 100  # of a tenant, unless its limit says otherwise
MOST_PRIORITY = 100
RETRY_SECONDS = 5.0  # before the second try; four times as long before the third
LONGEST_PAUSE = 60.0  # seconds for which a job that may go on is put aside
LINE = 500  # characters
MOST_LINES = 1000  # of a job; later lines are dropped, but not its last ones
ANEW: JsonObject = {"state": "waiting", "tries": 0, "due": 0.0, "cancelled": None, "ended": None, "error": None}
ANEW |= {"beside": False, "result": None}  # of a job that is tried as if it were new
Ended = Literal["waiting", "interrupted", "finished", "failed", "cancelled"]
LOST_TRIES = f"its worker was lost {TRIES} times: look at its log, and submit it again"


@final
class CellSpec(TypedDict):
    """A cell of a comparison or a trial of a sweep.

    Args:
        kind: of its row, or `trial`.
        study: the folder of its study.
        key: its name in its study.
        comparison: the folder that its version belongs to.
        alone: whether it needs a process of its own.
        needs: bytes; None: unknown.
        source: of its data, if it is not that of the recipe.
        metric: of a trial.
    """

    kind: str
    study: str
    key: str
    comparison: str
    alone: bool
    needs: int | None
    source: str | None
    metric: NotRequired[str]


@final
class StudySpec(TypedDict):
    """A comparison or a sweep. order: the fields of its request. sent: the data, as the client named it."""

    verb: str
    sent: str
    order: Mapping[str, Plain]


class StudyResult(TypedDict, total=False):
    """How far a study is, and at its end what it found."""

    study: str
    metric: str
    planned: int
    cells: list[JsonObject]
    report: str
    recipe: str
    said: str
    version: str | None
    missing: int


class StudyRow(TypedDict):
    """A study as the catalog lists it."""

    id: str
    name: str
    state: str
    created: str
    ended: str | None
    error: str | None
    who: str | None
    recipe: str
    spec: StudySpec
    result: StudyResult | None


class JobState(TypedDict):
    """How a job stands."""

    id: str
    state: str
    error: str | None
    result: JsonObject | None


@dataclass(frozen=True)
class Job(AsJson):
    """A job that this process has taken."""

    id: str
    tenant: str
    recipe: str  # TOML, as it was submitted
    tries: int  # with this one
    lease: Lease
    alone: bool = False  # the process that ran it beside others has died
    kind: str = TRAINING
    spec: CellSpec | StudySpec | None = None  # of a cell or a study
    died: bool = False  # the process that had it before has died

    @classmethod
    def of(cls, value: JsonMapping) -> Job:
        """What the parent process has taken, from `as_json`."""
        return cls(**{**value, "lease": Lease(**value["lease"])})


@dataclass(frozen=True)
class NewCell:
    """A cell that is submitted."""

    key: str  # its name in its study
    name: str  # of the adapter
    recipe: str  # TOML
    spec: CellSpec


@dataclass(frozen=True)
class Entry:
    """A job that is open. Without `recipe` and `spec` while many are compared."""

    id: str
    tenant: str
    priority: int = 0
    tries: int = 0
    queued: str | None = None
    due: float = 0.0
    cancelled: str | None = None
    state: str = "waiting"
    beside: bool = False
    kind: str = TRAINING
    owner: str = ""
    name: str = ""
    recipe: str = ""
    spec: CellSpec | StudySpec | None = None

    @property
    def died_beside(self) -> bool:
        """Whether, if nobody has it, the process has died that ran it and others."""
        return self.beside and self.state == "running"


@dataclass(frozen=True)
class OpenJob:
    """A job that waits or runs, for people. host: of the worker that has it; empty while none has."""

    id: str
    kind: str
    name: str  # of the adapter
    state: str
    queued: str
    priority: int
    tries: int
    owner: str
    cancelled: str | None
    host: str


class JobQueue:
    """The jobs of one store.

    Args:
        tenant: whose jobs are submitted, seen and cancelled; a worker takes those of all tenants.
    """

    def __init__(self, database: Database, training_runs: TrainingRuns, tenant: str = DEFAULT) -> None:
        self._database, self._runs, self._tenant = database, training_runs, tenant

    @classmethod
    def of(cls, store: Store, *, make: bool = False) -> JobQueue:
        """The queue of a store; raises NotFound unless the store exists or `make` is set."""
        database = store.database(make=make)
        return cls(database, store.training_runs(database), store.access.tenant)

    # --- clients ------------------------------------------------------------------------------------------------------

    def submit(
        self,
        name: str,
        recipe_toml: str,
        *,
        priority: int = 0,
        place: Callable[[Callable[[Connection], str]], str] | None = None,
        study: StudySpec | None = None,
    ) -> str:
        """Add a training, and return the id of its run.

        Args:
            study: what it compares or searches, if it is a study.
            place: makes sure of the data, and calls its argument in a writing transaction, which adds the run.

        Raises:
            QueueFull: the tenant has as many waiting jobs as it may.
        """
        if not -MOST_PRIORITY <= priority <= MOST_PRIORITY:
            raise RecipeError(f"priority {priority}: expected {-MOST_PRIORITY} to {MOST_PRIORITY}; higher is earlier")

        def add(connection: Connection) -> str:
            self._require_room(connection, WORK if study is None else (STUDY,))
            run, kind, verb = new_id(), TRAINING, "train"
            values: JsonObject = {"name": name, "recipe": recipe_toml, "priority": priority}
            if study is not None:
                run, kind, verb, values["spec"] = STUDY_ID + run, STUDY, str(study["verb"]), plain(study)
            add_job(connection, kind, run, self._tenant, **values)
            after: JsonObject = {"run": run, "priority": priority}
            audit.record(connection, verb, f"run {run}", name, after=after, at=now(), who=who())
            return run

        return self._adding(place, add)

    def submit_cells(
        self,
        study: str,
        cells: Sequence[NewCell],
        *,
        here: bool = False,
        place: Callable[[Callable[[Connection], str]], str] | None = None,
    ) -> list[str]:
        """Add cells of a study, or new tries of them, as long as there is room. One that is open stays as it is.

        Args:
            study: the folder of the study, such as `comparisons/reviews-0123456789`.
            here: this process takes them, so they are not in the queue.
            place: as for `submit`.

        Returns:
            The ids of the first ones, which are open now.

        Raises:
            QueueFull: there is no room for the first one.
            InUse: `here`, and another process runs one.
        """
        added: list[str] = []

        def add(connection: Connection) -> str:
            added.clear()
            for each in cells:
                try:
                    added.append(self._add_cell(connection, study, each, here=here))
                except QueueFull:
                    if not added:
                        raise
                    break
            return study

        self._adding(place, add)
        return added

    def _adding(
        self, place: Callable[[Callable[[Connection], str]], str] | None, add: Callable[[Connection], str]
    ) -> str:
        """Call `add` in a transaction of its own, or as `place` does."""
        if place is not None:
            return place(add)
        with self._database.writing() as connection:
            return add(connection)

    def _add_cell(self, connection: Connection, study: str, new: NewCell, *, here: bool) -> str:
        id = cell_id(self._tenant, study, new.key)
        old = _entry_of(connection, id)
        if old is not None and old.state in OPEN_STATES:
            held = old.state == "running" and id in leases.held_leases(connection, HELD)
            if not here and (held or old.queued is not None):
                return id
            if here and held:
                raise InUse(f"another process runs the cell {new.key}, and is waited for")
        if not here:
            self._require_room(connection)
        values: JsonObject = {"recipe": new.recipe, "spec": plain(new.spec), "queued": None if here else now()}
        if old is None:
            add_job(connection, CELL, id, self._tenant, name=new.name, **values)
            return id
        connection.execute(update(jobs).where(jobs.c.id == id).values(ANEW | values))
        return id

    def states(self, ids: Iterable[str]) -> dict[str, JobState]:
        """Id -> state, error and result of jobs."""
        chosen = select(jobs.c.id, jobs.c.state, jobs.c.error, jobs.c.result)
        with self._database.reading() as connection:
            rows = connection.execute(chosen.where(jobs.c.id.in_(list(ids)))).mappings().all()
        found: JsonValue = {row["id"]: dict(row) for row in rows}
        return found

    def studies(self, most: int) -> list[StudyRow]:
        """The newest studies, newest first, as `study` has them."""
        with self._database.reading() as connection:
            return self._studies(connection, most)

    def study(self, id: str) -> StudyRow:
        """A study: id, name, state, created, ended, error, who, recipe, spec, and `result`, which grows.

        Raises:
            NotFound: there is none of this id.
        """
        with self._database.reading() as connection:
            found = self._studies(connection, 1, jobs.c.id == id)
        if not found:
            raise NotFound(f"no comparison or sweep {ascii(id)[:60]}: start one, or list them")
        return found[0]

    def _studies(self, connection: Connection, most: int, *conditions: ColumnElement[bool]) -> list[StudyRow]:
        names = ("id", "name", "state", "created", "ended", "error", "who", "recipe", "spec", "result")
        chosen = select(*(jobs.c[name] for name in names)).where(seen_runs(connection, STUDY), *conditions)
        newest = chosen.order_by(jobs.c.created.desc(), jobs.c.id.desc()).limit(most)
        rows: list[JsonValue] = [dict(row) for row in connection.execute(newest).mappings()]
        held = leases.held_leases(connection, HELD) if any(row["state"] == "running" for row in rows) else set()
        for row in rows:
            if row["state"] == "running" and row["id"] not in held:
                row["state"] = "waiting"
        return rows

    def note(self, taken: Job, result: StudyResult) -> None:
        """Record what a job has found so far. Raises LeaseLost."""
        with self._database.writing() as connection:
            taken.lease.require_owner(connection)
            connection.execute(update(jobs).where(jobs.c.id == taken.id).values(result=plain(result)))

    def cancel(self, run: str) -> str:
        """End a waiting training now, and ask the worker of a running one to end it. Returns its state now.

        Of a study, its cells end too.

        Raises:
            NotFound: no such run of this tenant.
            InUse: it has ended, or is not from the queue.
        """
        with self._database.writing() as connection:
            entry = self._entry(connection, run)
            if entry.state not in OPEN_STATES:
                raise InUse(f"run {run} is {entry.state}: only a waiting or running one can be cancelled")
            _record_change(connection, "cancel", entry)
            state = _cancel(connection, entry)
            self._cancel_cells_of(connection, run)
            return state

    def resume(self, run: str, require: Callable[[Connection, str], None]) -> None:
        """Put a training that has failed or was cancelled back into the queue. It resumes from its last checkpoint.

        Args:
            require: called in the transaction with the recipe; raises if the data of the run is gone.

        Raises:
            NotFound: no such run of this tenant.
            InUse: it has not ended, has finished, or is not from the queue.
            QueueFull: the tenant has as many waiting jobs as it may.
        """
        with self._database.writing() as connection:
            entry = self._entry(connection, run)
            if entry.state not in ("failed", "cancelled"):
                raise InUse(f"run {run} is {entry.state}: only a failed or cancelled one can be resumed")
            require(connection, entry.recipe)
            self._require_room(connection)
            connection.execute(update(jobs).where(jobs.c.id == run).values(ANEW | {"queued": now()}))
            _record_change(connection, "resume", entry)

    def cancel_cells(self, ids: Iterable[str]) -> None:
        """End cells that wait in the queue, and ask the workers of those that run to end them."""
        if named := list(ids):
            with self._database.writing() as connection:
                self._cancel_cells(connection, named)

    def _cancel_cells(self, connection: Connection, ids: Sequence[str]) -> None:
        open_ = jobs.c.id.in_(ids) & jobs.c.cancelled.is_(None) & (jobs.c.tenant == self._tenant) & _open((CELL,))
        for entry in _entries(connection, open_):
            _cancel(connection, entry)

    def _cancel_cells_of(self, connection: Connection, id: str) -> None:
        """End the cells that a study has noted, if it is a study."""
        found = connection.execute(select(jobs.c.result).where(jobs.c.id == id, jobs.c.kind == STUDY)).scalar() or {}
        keys = [each["key"] for each in found.get("cells", ())]
        self._cancel_cells(connection, [cell_id(self._tenant, found["study"], key) for key in keys])

    def place(self, run: str) -> tuple[int, int] | None:
        """The place of a waiting training among those that may be seen, from 1, and how many wait; else None."""
        with self._database.reading() as connection:
            mine = seen_runs(connection) & (jobs.c.state == "waiting") & _open((TRAINING,))
            order = select(jobs.c.id).where(mine).order_by(jobs.c.priority.desc(), jobs.c.queued, jobs.c.id)
            found = list(connection.execute(order).scalars())
        return (found.index(run) + 1, len(found)) if run in found else None

    def open_jobs(self, limit: int) -> Sequence[OpenJob]:
        """The jobs of the tenant that run, then those that wait. A limited access sees its trainings alone."""
        columns = [jobs.c[each.name] for each in fields(OpenJob) if each.name != "host"]
        with self._database.reading() as connection:
            holds = (lease_rows.c.name == HELD + jobs.c.id) & (lease_rows.c.until > leases.clock(connection))
            query = select(*columns, lease_rows.c.host).outerjoin(lease_rows, holds)
            seen = seen_runs(connection) if not access_of(connection).whole else jobs.c.tenant == self._tenant
            order = jobs.c.state, jobs.c.priority.desc(), jobs.c.queued, jobs.c.id
            rows = connection.execute(query.where(_open((*WORK, STUDY, BATCH)), seen).order_by(*order).limit(limit))
            return [OpenJob(**{**row._mapping, "host": row.host or ""}) for row in rows]

    def log(self, run: str, after: int = 0) -> Sequence[JsonObject]:
        """The lines of a run's log with a higher `id`: id, at, line. Raises NotFound."""
        with self._database.reading() as connection:
            self._entry(connection, run)
            chosen = select(run_log.c.id, run_log.c.at, run_log.c.line)
            rows = connection.execute(chosen.where(run_log.c.run == run, run_log.c.id > after).order_by(run_log.c.id))
            return [dict(row._mapping) for row in rows]

    def limit(self, tenant: str, *, running: int | None, waiting: int | None) -> None:
        """Set how many trainings and cells of a tenant may run and wait; None for no limit."""
        for name, number in (("running", running), ("waiting", waiting)):
            if number is not None and number < 0:
                raise RecipeError(f"--{name} {number}: expected 0 or more")
        with self._database.writing() as connection:
            upsert(connection, queue_limits, [{"tenant": tenant, "running": running, "waiting": waiting}], change="set")

    # --- workers ------------------------------------------------------------------------------------------------------

    def take(
        self,
        accept: Callable[[Entry], bool] = lambda entry: True,
        mine: Callable[[Entry], bool] = lambda entry: True,
        kinds: Sequence[str] = WORK,
        also: Callable[[Connection, Job], None] = lambda connection, taken: None,
    ) -> Job | None:
        """Take the next job of some kinds, of any tenant; None if none is due, or the next one is not accepted.

        Args:
            accept: whether the next job may begin now. If not, later ones wait behind it.
            mine: whether this worker can do a job at all. Others are left to other workers.
            also: called in the transaction that takes the job.
        """
        with self._database.reading() as connection:  # most of the time there is none, and readers wait for nobody
            if not _waits(connection, kinds):
                return None
        with self._database.writing() as connection:
            entry = _next(connection, kinds, mine)
            taken = None if entry is None or not accept(entry) else _take(connection, entry)
            if taken is not None:
                also(connection, taken)
            return taken

    def take_one(self, id: str) -> Job | None:
        """Take one job, if it is open and nobody has it; None otherwise."""
        with self._database.writing() as connection:
            entry = _entry_of(connection, id)
            if entry is None or entry.state not in OPEN_STATES:
                return None
            if entry.queued is not None:
                if entry.id in leases.held_leases(connection, HELD) or _end_lost(connection, entry):
                    return None
                due = select(jobs.c.id).where(jobs.c.id == id, _is_due(leases.clock(connection)))
                if entry.state == "waiting" and connection.execute(due).first() is None:
                    return None
            return _take(connection, entry)

    def others_wait(self, kinds: Sequence[str], owner: str) -> bool:
        """Whether a job of another owner could be taken."""
        with self._database.reading() as connection:
            return any(each.owner != owner for each in _free(connection, kinds)[0])

    def waiting_recipes(self) -> list[str]:
        """The recipes, as they were submitted, of all trainings and cells that wait."""
        with self._database.reading() as connection:
            chosen = select(jobs.c.recipe).where(_open(WORK), jobs.c.state == "waiting")
            return list(connection.execute(chosen.distinct()).scalars())

    def set_beside(self, taken: Iterable[str]) -> None:
        """Record, before it is so, that jobs of this worker share a process."""
        with self._database.writing() as connection:
            connection.execute(update(jobs).where(jobs.c.id.in_(list(taken))).values(beside=True))

    def hold_alone(self, taken: Job) -> None:
        """Make this process the one that has a job whose process has died. Raises LeaseLost."""
        with self._database.writing() as connection:
            leases.adopt(connection, taken.lease)
            connection.execute(update(jobs).where(jobs.c.id == taken.id).values(beside=False))

    def set_recipe(self, taken: Job, recipe_toml: str) -> None:
        """Give a job that this worker has another recipe, for every worker that has it later. Raises LeaseLost."""
        with self._database.writing() as connection:
            taken.lease.require_owner(connection)
            connection.execute(update(jobs).where(jobs.c.id == taken.id).values(recipe=recipe_toml))

    def adopt(self, taken: Job) -> None:
        """Hold, in a child process, a job that the parent process has taken. Raises LeaseLost."""
        with self._database.writing() as connection:
            leases.adopt(connection, taken.lease)

    def adopt_training(self, taken: Job) -> HeldRun:
        """As `adopt`, for a training. Returns its run."""
        self.adopt(taken)
        return self._runs.hold(taken.id, taken.recipe, taken.lease)

    def write_log(self, taken: Job, lines: Iterable[str], *, last: bool = False) -> bool:
        """Add lines to the log of a job. Returns whether its end was asked for. Raises LeaseLost."""
        added = [plain_text(line)[:LINE] for line in lines]
        with self._database.reading() as connection:
            asked = connection.execute(select(jobs.c.cancelled).where(jobs.c.id == taken.id)).scalar() is not None
        if added:
            with self._database.writing() as connection:
                taken.lease.require_owner(connection)  # its process may have ended the job, before these lines
                count = connection.execute(select(func.count()).where(run_log.c.run == taken.id)).scalar_one()
                rows = [{"run": taken.id, "tenant": taken.tenant, "at": now(), "line": line} for line in added]
                kept = rows if last else rows[: max(0, MOST_LINES - count)]
                if kept:
                    connection.execute(insert(run_log), kept)
        return asked

    def finish(self, taken: Job, result: Mapping[str, Plain] | StudyResult | None = None) -> None:
        """Record that a job has ended well. Raises LeaseLost."""
        with self._database.writing() as connection:
            taken.lease.require(connection)
            end_job(connection, taken.id, "finished", None, taken.lease, result)

    def end_try(
        self,
        taken: Job,
        problem: str | None,
        *,
        again: bool = True,
        outage: bool = False,
        result: Mapping[str, Plain] | StudyResult | None = None,
    ) -> Ended | None:
        """Record how a try ended that did not finish the job.

        Args:
            problem: a line; None: the worker was stopped, or the end of the job was asked for.
            again: whether another try may succeed.
            outage: the store's own places did not answer. Then the try does not count.
            result: of a job that has failed now.

        Returns:
            The new state; None if the job had ended already.

        Raises:
            LeaseLost: another worker has taken it.
        """
        with self._database.writing() as connection:
            taken.lease.require_owner(connection)
            row = _entry_of(connection, taken.id)
            if row is None or row.state != "running":
                return None
            if row.cancelled is not None:
                self._cancel_cells_of(connection, taken.id)
                return end_job(connection, taken.id, "cancelled", problem or "its end was asked for", taken.lease)
            counts = problem is not None and not outage
            if problem is not None and (row.queued is None or (counts and (not again or row.tries >= TRIES))):
                return end_job(connection, taken.id, "failed", problem, taken.lease, result)
            leases.release(connection, taken.lease)
            pause = RETRY_SECONDS * 4 ** (row.tries - 1) if counts else RETRY_SECONDS if outage else 0.0
            waits = {"due": leases.clock(connection) + pause, "tries": row.tries - (not counts)}
            connection.execute(update(jobs).where(jobs.c.id == taken.id).values(waits))
            return end_job(connection, taken.id, "waiting" if row.queued is not None else "interrupted", problem)

    def return_alone(self, taken: Job, problem: str | None) -> None:
        """As `put_aside`, of a cell that shared a process and is next tried in a process of its own."""
        assert taken.spec is not None
        assert "verb" not in taken.spec
        self._put_aside(taken, 0.0, {"spec": {**taken.spec, "alone": True}, "error": problem})

    def put_aside(self, taken: Job, seconds: float = 0.0) -> None:
        """Return a job whose worker lives, for others or for later; the try does not count. Raises LeaseLost."""
        self._put_aside(taken, seconds, {})

    def _put_aside(self, taken: Job, seconds: float, values: Mapping[str, CellSpec | StudySpec | str | None]) -> None:
        with self._database.writing() as connection:
            taken.lease.require_owner(connection)
            leases.release(connection, taken.lease)
            due = leases.clock(connection) + min(seconds, LONGEST_PAUSE) if seconds else 0.0
            waits = {"state": "waiting", "due": due, "tries": jobs.c.tries - 1, **values}
            connection.execute(update(jobs).where(jobs.c.id == taken.id, jobs.c.state == "running").values(waits))

    def _require_room(self, connection: Connection, kinds: Sequence[str] = WORK) -> None:
        waiting = _count_waiting(connection, kinds, jobs.c.tenant == self._tenant)
        row = connection.execute(select(queue_limits.c.waiting).where(queue_limits.c.tenant == self._tenant)).first()
        most = MOST_WAITING if row is None else row.waiting
        if most is not None and waiting >= most:
            raise QueueFull(
                f"{waiting} trainings of tenant {self._tenant} wait already, and {most} may: wait for them, or "
                "cancel some with `turret runs cancel`"
            )

    def _entry(self, connection: Connection, run: str) -> Entry:
        seen = or_(seen_runs(connection), seen_runs(connection, STUDY))
        entry = _entry_of(connection, run, jobs.c.tenant == self._tenant, seen)
        if entry is None:
            raise NotFound(f"no run {ascii(run)[:60]} in the queue: `turret train --queue` adds one")
        if entry.queued is None:
            raise InUse(f"run {run} is not from the queue: end it with Ctrl-C where it runs")
        return entry


def cell_id(tenant: str, study: str, key: str) -> str:
    """The id of a cell's job, which the next call of the same study finds again."""
    return f"cell-{hashlib.sha256(f'{tenant}/{study}/{key}'.encode()).hexdigest()[:32]}"


def add_job(
    connection: Connection, kind: str, id: str, tenant: str, *, name: str = "", **values: JsonObject | str | int | None
) -> None:
    """Add a job that waits. values: of other columns; it is in the queue unless they say otherwise."""
    moment = now()
    row: JsonObject = {"id": id, "kind": kind, "tenant": tenant, "name": name, "state": "waiting", "created": moment}
    row |= {"recipe_digest": digest_of(str(values.get("recipe", ""))), "data_digest": "", "who": who()}
    connection.execute(insert(jobs).values({"queued": moment, **row, **values}))


def end_job(
    connection: Connection,
    id: str,
    state: Ended,
    error: str | None,
    by: Lease | None = None,
    result: Mapping[str, Plain] | StudyResult | None = None,
) -> Ended:
    """Set the state of a job that nobody has, or that the worker with the lease `by` has."""
    ended = None if state in ("waiting", "interrupted") else now()
    if ended is not None:  # whoever had it, and wakes up, writes nothing
        leases.close(connection, HELD + id, by)
    values: JsonObject = {"state": state, "ended": ended, "error": None if error is None else plain_text(error)}
    if result is not None:
        values["result"] = plain(result)
    connection.execute(update(jobs).where(jobs.c.id == id).values(values))
    return state


def in_turn(
    waiting: Iterable[Entry],
    running: Mapping[str, int],
    turns: Mapping[str, int],
    most: Mapping[str, int | None],
) -> list[Entry]:
    """Who is next, and who after that.

    Args:
        waiting: what may be taken.
        running: tenant -> jobs that run.
        turns: `tenant <tenant>` and `owner <owner>` -> its last turn.
        most: tenant -> jobs that may run; no entry or None for no limit.
    """
    limits = {tenant for tenant, limit in most.items() if limit is not None and running.get(tenant, 0) >= limit}

    def turn(each: Entry) -> tuple[int, int, str, int, str, int, str, str]:
        tenant, owner = each.tenant, each.owner
        of_tenant = running.get(tenant, 0), turns.get(f"tenant {tenant}", 0), tenant
        return *of_tenant, turns.get(f"owner {owner}", 0), owner, -each.priority, each.queued or "", each.id

    return sorted((each for each in waiting if each.tenant not in limits), key=turn)


def count_waiting(database: Database, kinds: Sequence[str] = (*WORK, STUDY)) -> int:
    """Jobs of all tenants that wait for a worker."""
    with database.reading() as connection:
        return _count_waiting(connection, kinds)


# --- private ----------------------------------------------------------------------------------------------------------

_WHOLE = [jobs.c[each.name] for each in fields(Entry)]
_LIGHT = [each for each in _WHOLE if each.name not in ("recipe", "spec")]


def _record_change(connection: Connection, verb: str, entry: Entry) -> None:
    before = {"state": entry.state}
    audit.record(connection, verb, f"run {entry.id}", entry.name, before=before, at=now(), who=who())


def _open(kinds: Sequence[str]) -> ColumnElement[bool]:
    """The jobs of some kinds that wait or run, and are from the queue."""
    return jobs.c.state.in_(OPEN_STATES) & jobs.c.kind.in_(kinds) & jobs.c.queued.is_not(None)


def _count_waiting(connection: Connection, kinds: Sequence[str], *conditions: ColumnElement[bool]) -> int:
    waiting = select(func.count()).where(_open(kinds), jobs.c.state == "waiting", *conditions)
    return int(connection.execute(waiting).scalar_one())


def _entries(connection: Connection, *conditions: ColumnElement[bool]) -> list[Entry]:
    return [Entry(*row) for row in connection.execute(select(*_LIGHT).where(*conditions))]


def _entry_of(connection: Connection, id: str, *conditions: ColumnElement[bool]) -> Entry | None:
    row = connection.execute(select(*_WHOLE).where(jobs.c.id == id, *conditions)).first()
    return None if row is None else Entry(*row)


def _is_due(clock: float) -> ColumnElement[bool]:
    """Jobs that may be tried now. A time that is too far away is from before the clock was set back."""
    return or_(jobs.c.due <= clock, jobs.c.due > clock + LONGEST_PAUSE + 1)


def _waits(connection: Connection, kinds: Sequence[str]) -> bool:
    """Whether any job is due, or runs without a living worker."""
    waiting = _open(kinds) & (jobs.c.state == "waiting") & _is_due(leases.clock(connection))
    if connection.execute(select(jobs.c.id).where(waiting).limit(1)).first() is not None:
        return True
    running = connection.execute(select(jobs.c.id).where(_open(kinds), jobs.c.state == "running")).scalars().all()
    return bool(running) and not set(running) <= leases.held_leases(connection, HELD)


def _free(connection: Connection, kinds: Sequence[str], *, all: bool = False) -> tuple[list[Entry], Counter[str]]:
    """The jobs that may be taken, if their end is not due, and how many of each tenant run.

    Args:
        all: every job that waits, not the first one of each owner alone.
    """
    held, open_ = leases.held_leases(connection, HELD), _open(kinds)
    rows = _entries(connection, open_, jobs.c.state == "running")
    order = jobs.c.priority.desc(), jobs.c.queued, jobs.c.id
    place = func.row_number().over(partition_by=(jobs.c.tenant, jobs.c.owner), order_by=order).label("place")
    waiting = select(*_LIGHT, place).where(open_, jobs.c.state == "waiting", _is_due(leases.clock(connection)))
    found = waiting.subquery()
    chosen = select(found) if all else select(found).where(found.c.place == 1)
    free = [Entry(*row[:-1]) for row in connection.execute(chosen)]
    running = Counter(each.tenant for each in rows if each.id in held)
    return [each for each in (*rows, *free) if each.id not in held], running


def _next(connection: Connection, kinds: Sequence[str], mine: Callable[[Entry], bool]) -> Entry | None:
    """The next job of those that are mine; ends those whose end is due."""
    lane = f"{_lane(kinds[0])} "
    chosen = select(job_turns).where(job_turns.c.name.startswith(lane, autoescape=True))
    turns = {row.name.removeprefix(lane): row.turn for row in connection.execute(chosen)}
    most = {} if BATCH in kinds else {row.tenant: row.running for row in connection.execute(select(queue_limits))}
    for all in (False, True):  # if the first job of each owner is not mine, a later one may be
        free, running = _free(connection, kinds, all=all)
        free = [each for each in free if not _end_lost(connection, each)]
        for each in in_turn(free, running, turns, most):
            entry = _entry_of(connection, each.id)
            if entry is not None and mine(entry):
                return entry
    return None


def _end_lost(connection: Connection, entry: Entry) -> bool:
    """End a job that nobody has, if it was cancelled or tried too often. A worker ends a batch itself."""
    if entry.kind == BATCH:
        return False
    if entry.cancelled is not None:
        end_job(connection, entry.id, "cancelled", "its end was asked for")
    elif entry.tries >= TRIES and not entry.died_beside:
        end_job(connection, entry.id, "failed", LOST_TRIES)
    else:
        return False
    return True


def _take(connection: Connection, entry: Entry) -> Job | None:
    ours = leases.was_ours(connection, HELD + entry.id)  # given up in an outage, so nobody has died
    lease = leases.take(connection, HELD + entry.id)
    if lease is None:
        return None
    died = entry.state == "running" and not ours
    tries = entry.tries + (not entry.died_beside and not (ours and entry.state == "running"))
    running = {"state": "running", "tries": tries, "beside": False, "ended": None, "error": None}
    connection.execute(update(jobs).where(jobs.c.id == entry.id).values(running))
    if entry.queued is not None:
        _count_turn(connection, entry)
    return Job(entry.id, entry.tenant, entry.recipe, tries, lease, entry.died_beside, entry.kind, entry.spec, died)


def _lane(kind: str) -> str:
    return BATCH if kind == BATCH else "work"


def _count_turn(connection: Connection, entry: Entry) -> None:
    lane = _lane(entry.kind)
    turn = int(connection.execute(select(func.coalesce(func.max(job_turns.c.turn), 0))).scalar_one()) + 1
    names = f"{lane} tenant {entry.tenant}", f"{lane} owner {entry.owner}"
    upsert(connection, job_turns, [{"name": each, "turn": turn} for each in names], change="set")


def _cancel(connection: Connection, entry: Entry) -> str:
    """Returns the state of the job now."""
    connection.execute(update(jobs).where(jobs.c.id == entry.id).values(cancelled=now()))
    if entry.state == "running" and entry.id in leases.held_leases(connection, HELD):
        return "running"
    return end_job(connection, entry.id, "cancelled", f"cancelled by {who() or 'somebody'}")
