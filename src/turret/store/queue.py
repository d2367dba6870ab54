"""The queue of trainings: what is submitted, who is next, and what happens after each try.

A queued run has a state, which the table `runs` keeps:

- waiting: any worker may take it, once it is due
- running: a worker has its lease (`turret.store.leases`). If the lease ends, another worker takes it
- finished, failed, cancelled: it has ended

A worker takes the next run in a transaction that writes. There is one such transaction at a time, on PostgreSQL too, so
no two workers take the same run and none waits for a row that another one has.

Who is next: of the tenants that may run one more training, the one with the fewest running trainings, then the one
whose last training started first. Of its runs: the highest priority, then the oldest. So a tenant with a thousand
waiting runs delays the others by one training at most, and priorities order the runs of one tenant only.

A run is tried three times at most. A try that a worker returns, because it was stopped, does not count, nor does one
that an outage of the store's own places has ended. If a process dies that trained several runs, nobody knows which of
them ended it: no try is counted, and each is next tried alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from sqlalchemy import ColumnElement, Connection, func, insert, select, update

from turret import audit
from turret.database import Database, runs
from turret.errors import InUse, NotFound, QueueFull, RecipeError
from turret.json_types import JsonMapping, JsonObject
from turret.store import leases
from turret.store.catalog import now, who
from turret.store.leases import Lease
from turret.store.runs import DEFAULT, PREFIX, HeldRun, TrainingRuns, plain_error, queue, queue_limits, run_log
from turret.visibility import seen_runs

if TYPE_CHECKING:
    from turret.store.core import Store

TRIES = 3
MOST_WAITING = 100  # of a tenant, unless its limit says otherwise
MOST_PRIORITY = 100
RETRY_SECONDS = 5.0  # before the second try; four times as long before the third
LINE = 500  # characters
MOST_LINES = 1000  # of a run; later lines are dropped, but not its last ones
Ended = Literal["waiting", "failed", "cancelled"]
LOST_TRIES = f"its worker was lost {TRIES} times: look at its log, and submit it again"


@dataclass(frozen=True)
class QueuedRun:
    """A run that this process has taken from the queue."""

    run: str
    tenant: str
    recipe: str  # TOML, as it was submitted
    tries: int  # with this one
    lease: Lease
    alone: bool = False  # the process that trained it beside others has died

    def as_json(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def of(cls, value: JsonMapping) -> QueuedRun:
        """What the parent process has taken, from `as_json`."""
        return cls(**{**value, "lease": Lease.of(value["lease"])})


class TrainingQueue:
    """The queue of one store.

    Args:
        tenant: whose runs are submitted, seen and cancelled; a worker takes those of all tenants.
    """

    def __init__(self, database: Database, training_runs: TrainingRuns, tenant: str = DEFAULT) -> None:
        self._database, self._runs, self._tenant = database, training_runs, tenant

    @classmethod
    def of(cls, store: Store, *, make: bool = False) -> TrainingQueue:
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
    ) -> str:
        """Add a training, and return the id of its run.

        Args:
            place: makes sure of the data, and calls its argument in a writing transaction, which adds the run.

        Raises:
            QueueFull: the tenant has as many waiting runs as it may.
        """
        if not -MOST_PRIORITY <= priority <= MOST_PRIORITY:
            raise RecipeError(f"priority {priority}: expected {-MOST_PRIORITY} to {MOST_PRIORITY}; higher is earlier")

        def add(connection: Connection) -> str:
            waiting = _count(connection, self._tenant, "waiting")
            most = _most_waiting(connection, self._tenant)
            if most is not None and waiting >= most:
                raise QueueFull(
                    f"{waiting} trainings of tenant {self._tenant} wait already, and {most} may: wait for them, or "
                    "cancel some with `turret runs cancel`"
                )
            run = self._runs.add_waiting(connection, name, recipe_toml)
            row = {"run": run, "tenant": self._tenant, "priority": priority, "tries": 0, "queued": now()}
            connection.execute(insert(queue).values(**row, due=0.0, who=who(), recipe=recipe_toml))
            after = {"run": run, "priority": priority}
            audit.record(connection, "train", f"run {run}", name, after=after, at=now(), who=who())
            return run

        if place is not None:
            return place(add)
        with self._database.writing() as connection:
            return add(connection)

    def cancel(self, run: str) -> str:
        """End a waiting run now, and ask the worker of a running one to end it. Returns the state of the run now.

        Raises:
            NotFound: no such run of this tenant.
            InUse: it has ended, or is not from the queue.
        """
        with self._database.writing() as connection:
            entry = self._entry(connection, run)
            if entry.state not in ("waiting", "running"):
                raise InUse(f"run {run} is {entry.state}: only a waiting or running one can be cancelled")
            connection.execute(update(queue).where(queue.c.run == run).values(cancelled=now()))
            name = connection.execute(select(runs.c.name).where(runs.c.id == run)).scalar_one()
            before = {"state": entry.state}
            audit.record(connection, "cancel", f"run {run}", name, before=before, at=now(), who=who())
            if entry.state == "running" and run in leases.held(connection, PREFIX):
                return "running"
            _end(connection, run, "cancelled", f"cancelled by {who() or 'somebody'}")
            return "cancelled"

    def place(self, run: str) -> tuple[int, int] | None:
        """The place of a waiting run among those of its tenant, from 1, and how many wait; else None."""
        with self._database.reading() as connection:
            mine = (queue.c.tenant == self._tenant) & (runs.c.state == "waiting")
            waiting = select(queue.c.run).join(runs, runs.c.id == queue.c.run).where(mine)
            order = waiting.order_by(queue.c.priority.desc(), queue.c.queued, queue.c.run)
            found = list(connection.execute(order).scalars())
        return (found.index(run) + 1, len(found)) if run in found else None

    def log(self, run: str, after: int = 0) -> Sequence[JsonObject]:
        """The lines of a run's log with a higher `id`: id, at, line. Raises NotFound."""
        with self._database.reading() as connection:
            self._entry(connection, run)
            chosen = select(run_log.c.id, run_log.c.at, run_log.c.line)
            rows = connection.execute(chosen.where(run_log.c.run == run, run_log.c.id > after).order_by(run_log.c.id))
            return [dict(row._mapping) for row in rows]

    def limit(self, tenant: str, *, running: int | None, waiting: int | None) -> None:
        """Set how many trainings of a tenant may run and wait; None for no limit."""
        for name, number in (("running", running), ("waiting", waiting)):
            if number is not None and number < 0:
                raise RecipeError(f"--{name} {number}: expected 0 or more")
        values = {"running": running, "waiting": waiting}
        with self._database.writing() as connection:
            changed = connection.execute(update(queue_limits).where(queue_limits.c.tenant == tenant).values(values))
            if changed.rowcount == 0:
                connection.execute(insert(queue_limits).values(tenant=tenant, **values))

    # --- workers ------------------------------------------------------------------------------------------------------

    def take(
        self, accept: Callable[[Entry], bool] = lambda entry: True, mine: Callable[[Entry], bool] = lambda entry: True
    ) -> QueuedRun | None:
        """Take the next run, of any tenant; None if none is due, or the next one is not accepted.

        Args:
            accept: whether the next run may begin now. If not, later ones wait behind it.
            mine: whether this worker can train a run at all. Others are left to other workers.
        """
        with self._database.reading() as connection:  # most of the time there is none, and readers wait for nobody
            if not _waits(connection):
                return None
        with self._database.writing() as connection:
            entry = _next(connection, mine)
            if entry is None or not accept(entry):
                return None
            lease = leases.take(connection, PREFIX + entry.run)
            if lease is None:
                return None
            tries = entry.tries + (not entry.died_beside)
            started = {"tries": tries, "started": now(), "beside": False}
            connection.execute(update(queue).where(queue.c.run == entry.run).values(started))
            running = {"state": "running", "ended": None, "error": None}
            connection.execute(update(runs).where(runs.c.id == entry.run).values(running))
        return QueuedRun(entry.run, entry.tenant, entry.recipe, tries, lease, entry.died_beside)

    def waiting_recipes(self) -> list[str]:
        """The recipes, as they were submitted, of all runs that wait."""
        with self._database.reading() as connection:
            chosen = select(queue.c.recipe).join(runs, runs.c.id == queue.c.run).where(runs.c.state == "waiting")
            return list(connection.execute(chosen.distinct()).scalars())

    def set_beside(self, taken: Iterable[str]) -> None:
        """Record, before it is so, that runs of this worker share a process."""
        with self._database.writing() as connection:
            connection.execute(update(queue).where(queue.c.run.in_(list(taken))).values(beside=True))

    def hold_alone(self, taken: QueuedRun) -> None:
        """Make this process the one that has a run whose process has died. Raises LeaseLost."""
        with self._database.writing() as connection:
            leases.adopt(connection, taken.lease)
            connection.execute(update(queue).where(queue.c.run == taken.run).values(beside=False))

    def set_recipe(self, taken: QueuedRun, recipe_toml: str) -> None:
        """Give a run that this worker has another recipe, for every worker that has it later. Raises LeaseLost."""
        with self._database.writing() as connection:
            taken.lease.require_owner(connection)
            connection.execute(update(queue).where(queue.c.run == taken.run).values(recipe=recipe_toml))

    def adopt(self, taken: QueuedRun) -> HeldRun:
        """Hold, in a child process, a run that the parent process has taken. Raises LeaseLost."""
        with self._database.writing() as connection:
            leases.adopt(connection, taken.lease)
        return self._runs.hold(taken.run, taken.recipe, taken.lease, resumed=taken.tries > 1)

    def write_log(self, taken: QueuedRun, lines: Iterable[str], *, last: bool = False) -> bool:
        """Add lines to the log of a run. Returns whether its end was asked for. Raises LeaseLost."""
        added = [plain_error(line)[:LINE] for line in lines]
        with self._database.reading() as connection:
            asked = connection.execute(select(queue.c.cancelled).where(queue.c.run == taken.run)).scalar() is not None
        if added:
            with self._database.writing() as connection:
                taken.lease.require_owner(connection)  # its process may have ended the run, before these lines
                count = connection.execute(select(func.count()).where(run_log.c.run == taken.run)).scalar_one()
                rows = [{"run": taken.run, "tenant": taken.tenant, "at": now(), "line": line} for line in added]
                kept = rows if last else rows[: max(0, MOST_LINES - count)]
                if kept:
                    connection.execute(insert(run_log), kept)
        return asked

    def after(self, taken: QueuedRun, problem: str | None, *, again: bool = True, outage: bool = False) -> Ended | None:
        """Record how a try ended that did not finish the training.

        Args:
            problem: a line; None: the worker was stopped, or the end of the run was asked for.
            again: whether another try may succeed.
            outage: the store's own places did not answer. Then the try does not count.

        Returns:
            The new state; None if the run had ended already.

        Raises:
            LeaseLost: another worker has taken it.
        """
        with self._database.writing() as connection:
            taken.lease.require_owner(connection)
            (row,) = entries(connection, queue.c.run == taken.run)
            if row.state != "running":
                return None
            if row.cancelled is not None:
                return _end(connection, taken.run, "cancelled", problem or "its end was asked for", taken.lease)
            counts = problem is not None and not outage
            if counts and (not again or row.tries >= TRIES):
                return _end(connection, taken.run, "failed", problem, taken.lease)
            leases.release(connection, taken.lease)
            pause = RETRY_SECONDS * 4 ** (row.tries - 1) if counts else RETRY_SECONDS if outage else 0.0
            waits = {"due": leases.clock(connection) + pause, "tries": row.tries - (not counts)}
            connection.execute(update(queue).where(queue.c.run == taken.run).values(waits))
            return _end(connection, taken.run, "waiting", problem)

    def _entry(self, connection: Connection, run: str) -> Entry:
        found = entries(connection, queue.c.run == run, queue.c.tenant == self._tenant, seen_runs(connection))
        if not found and connection.execute(select(runs.c.id).where(runs.c.id == run, seen_runs(connection))).first():
            raise InUse(f"run {run} is not from the queue: end it with Ctrl-C where it runs")
        if not found:
            raise NotFound(f"no run {ascii(run)[:60]} in the queue: `turret train --queue` adds one")
        return found[0]


@dataclass(frozen=True)
class Entry:
    """A row of the queue, and the state of its run."""

    run: str
    tenant: str
    priority: int
    tries: int
    queued: str
    started: str | None
    due: float
    cancelled: str | None
    who: str | None
    recipe: str
    state: str
    beside: bool = False

    @property
    def died_beside(self) -> bool:
        """Whether, if nobody has it, the process has died that trained it and others."""
        return self.beside and self.state == "running"


def entries(connection: Connection, *conditions: ColumnElement[bool]) -> list[Entry]:
    """The queued runs that meet the conditions."""
    chosen = select(queue, runs.c.state).join(runs, runs.c.id == queue.c.run).where(*conditions)
    return [Entry(**row) for row in connection.execute(chosen.order_by(queue.c.run)).mappings()]


def choose(
    waiting: Iterable[Entry], running: Mapping[str, int], started: Mapping[str, str], most: Mapping[str, int | None]
) -> Entry | None:
    """Who is next.

    Args:
        waiting: what may be taken.
        running: tenant -> trainings that run.
        started: tenant -> when its last training started.
        most: tenant -> trainings that may run; no entry or None for no limit.
    """

    def may(tenant: str) -> bool:
        limit = most.get(tenant)
        return limit is None or running.get(tenant, 0) < limit

    def turn(each: Entry) -> tuple[int, str, str, int, str, str]:
        tenant = each.tenant
        return running.get(tenant, 0), started.get(tenant, ""), tenant, -each.priority, each.queued, each.run

    return min((each for each in waiting if may(each.tenant)), key=turn, default=None)


def _waits(connection: Connection) -> bool:
    """Whether any run waits, or runs without a living worker."""
    rows = connection.execute(
        select(runs.c.id, runs.c.state).join(queue, queue.c.run == runs.c.id).where(_open())
    ).all()
    held = leases.held(connection, PREFIX) if rows else set()
    return any(row.state == "waiting" or row.id not in held for row in rows)


def _next(connection: Connection, mine: Callable[[Entry], bool]) -> Entry | None:
    """The next run of those that are mine; ends those that were cancelled or tried too often while nobody had them."""
    held, clock, running, waiting = leases.held(connection, PREFIX), leases.clock(connection), Counter[str](), []
    for each in entries(connection, _open()):
        if each.state == "running" and each.run in held:
            running[each.tenant] += 1
        elif each.run in held:  # its last worker has not let it go
            continue
        elif each.cancelled is not None:
            _end(connection, each.run, "cancelled", "its end was asked for")
        elif each.tries >= TRIES and not each.died_beside:
            _end(connection, each.run, "failed", LOST_TRIES)
        elif each.due <= clock:
            waiting.append(each)
    last = select(queue.c.tenant, func.max(queue.c.started)).group_by(queue.c.tenant)
    started = {str(tenant): str(when or "") for tenant, when in connection.execute(last)}
    most = {row.tenant: row.running for row in connection.execute(select(queue_limits))}
    return choose([each for each in waiting if mine(each)], running, started, most)


def _open() -> ColumnElement[bool]:
    return runs.c.state.in_(("waiting", "running"))


def _count(connection: Connection, tenant: str, state: str) -> int:
    chosen = select(func.count()).select_from(queue).join(runs, runs.c.id == queue.c.run)
    return int(connection.execute(chosen.where(queue.c.tenant == tenant, runs.c.state == state)).scalar_one())


def _most_waiting(connection: Connection, tenant: str) -> int | None:
    row = connection.execute(select(queue_limits.c.waiting).where(queue_limits.c.tenant == tenant)).first()
    return MOST_WAITING if row is None else row.waiting


def _end(connection: Connection, run: str, state: Ended, error: str | None, by: Lease | None = None) -> Ended:
    """Set the state of a run that nobody has, or that the worker with the lease `by` has."""
    ended = None if state == "waiting" else now()
    if ended is not None:  # whoever had it, and wakes up, writes nothing
        leases.close(connection, PREFIX + run, by)
    values = {"state": state, "ended": ended, "error": None if error is None else plain_error(error)}
    connection.execute(update(runs).where(runs.c.id == run).values(values))
    return state
