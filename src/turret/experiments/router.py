"""Assign requests to versions in a server process, and log answers and outcomes.

This is cheap enough for every request. Once a second running experiments are read, if one may have changed. An
assignment is a hash and a look-up, and the log is written in one transaction per second. Both happen in `turn`, which a
server calls from its own thread; otherwise `assign` does it if the last read is older than a second. Safe to use from
several threads.

A killed process loses the log of its last second. It loses no assignment, because that follows from the unit. While the
store cannot be reached, known experiments continue, and up to `MOST_KEPT` answers of the log are kept; `problem` has
the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection

from turret.access import Access
from turret.audit import Mark
from turret.database import Database, see_as
from turret.errors import BadExperiment, BadReference, NotFound, StoreError
from turret.experiments import assign, outcomes, rows
from turret.experiments.experiment import Experiment
from turret.experiments.outcomes import Recorded, Seen, check_receipt
from turret.experiments.rows import ArmHealth
from turret.json_types import JsonValue, Plain
from turret.reference import check_name
from turret.timestamp import timestamp

REFRESH = 1.0  # seconds between two reads, and between two writes of the log
MOST_KEPT = 100_000  # unwritten answers, while the store cannot be reached


@dataclass(frozen=True)
class Assignment:
    """The version that answers, with its arm and probability."""

    version: str  # "news@2"
    arm: str
    probability: float
    experiment: str  # "news#1"
    shadows: tuple[tuple[str, str], ...]  # arm and version of each shadow
    experiment_id: int
    unit: str  # hashed
    revision: int  # of the split


@dataclass(frozen=True)
class Told:
    """A reported outcome: of the answer with this receipt, or of a unit of the adapter's experiment."""

    value: JsonValue
    receipt: str | None = None
    unit: str | None = None
    adapter: str | None = None


class Router:
    """The running experiments of a store, in one process.

    Args:
        clock: returns seconds since 1970; its time is logged.
        mark: returns what differs after a change of an experiment; without it they are read every second.
    """

    def __init__(self, database: Database, clock: Callable[[], float], mark: Callable[[], Mark] | None = None) -> None:
        self._database, self._clock, self._mark = database, clock, mark
        self._read_mark: Mark | None = None  # of the last read
        self._lock = threading.Lock()  # for the fields below
        self._reading, self._writing = threading.Lock(), threading.Lock()  # held while the store is read or written
        self._known: dict[str, Experiment] | None = None
        self._max_seconds: dict[int, float | None] = {}  # experiment id -> its guard on latency
        self._read_at = float("-inf")
        self._unwritten: list[Seen] = []
        self._sums: dict[tuple[int, str], ArmHealth] = {}
        self.problem: str | None = None  # the reason why the store cannot be reached
        self.lost = 0  # answers that were not logged

    def running(self, name: str) -> Experiment | None:
        """The running experiment of a name, or None. Its `unit` says what to assign: a user, session or request."""
        return self._running().get(name)

    def running_experiments(self) -> list[Experiment]:
        return list(self._running().values())

    def assign(self, name: str, unit: str, receipt: str | None = None) -> Assignment | None:
        """Choose the version for a unit, and log it; None if no experiment of the name is running.

        Args:
            unit: a user id, session id or request id, as `running(name).unit` says; only its hash is stored.
            receipt: the id of the answer, which its outcome can refer to.
        """
        if receipt is not None:
            check_receipt(receipt)
        experiment = self.running(name)
        if experiment is None:
            return None
        found = self.choose(experiment, unit)
        self.log(found, receipt)
        return found

    def choose(self, experiment: Experiment, unit: str) -> Assignment:
        """Choose without logging, if the id of the answer is not known yet. `log` must follow in any case."""
        key = assign.key_of(experiment.salt, unit)
        arm = experiment.arm(assign.arm_at(experiment.segments, assign.point_of(key)))
        return Assignment(
            version=experiment.reference(arm),
            arm=arm.name,
            probability=experiment.weights[arm.name],
            experiment=str(experiment),
            shadows=tuple((each.name, experiment.reference(each)) for each in experiment.shadows),
            experiment_id=experiment.id,
            unit=key,
            revision=experiment.revision,
        )

    def log(self, found: Assignment, receipt: str | None = None) -> None:
        """Log that the unit was sent to its arm; written within a second."""
        seen = Seen(found.experiment_id, found.unit, found.arm, found.revision, found.probability, self._at(), receipt)
        with self._lock:
            if len(self._unwritten) >= MOST_KEPT:
                self.lost += 1
                return
            self._unwritten.append(seen)

    def answered(self, assignment: Assignment, *, seconds: float, error: bool = False) -> None:
        """Count an answer of the arm for its guards on errors and latency."""
        self._add(assignment, assignment.arm, seconds, error, None)

    def shadowed(
        self, assignment: Assignment, arm: str, *, seconds: float, error: bool = False, agrees: bool | None = None
    ) -> None:
        """Count an answer of a shadow; `agrees` says whether it equals the returned answer."""
        self._add(assignment, arm, seconds, error, agrees)

    def outcome(
        self, value: Plain, *, receipt: str | None = None, unit: str | None = None, name: str | None = None
    ) -> Recorded:
        """Record an outcome by the receipt of its answer, or by unit and adapter name."""
        told = Told(value, receipt, unit, name)
        with self._write_log() as connection:
            return self._record(connection, told)

    def outcomes(self, told: Sequence[Told], access: Access | None = None) -> list[Recorded]:
        """Record many outcomes in one transaction; one for a name without an experiment is `unknown`.

        Args:
            access: of who reports them, of the store's tenant; None: all that the tenant has.
        """
        found: list[Recorded] = []
        with self._write_log() as connection:
            if access is not None:
                see_as(connection, access)
            for each in told:
                try:
                    found.append(self._record(connection, each))
                except (NotFound, BadReference) as error:
                    found.append(Recorded("unknown", str(error)))
        return found

    def turn(self) -> None:
        """Read running experiments and write the log. Call it once a second; errors go to `problem`."""
        self._refresh()
        try:
            self.flush()
        except StoreError as error:
            self.problem = str(error)

    def look(self) -> None:
        """Read running experiments now."""
        with self._lock:
            self._read_at, self._read_mark = float("-inf"), None
        self._refresh(wait=True)

    def flush(self) -> None:
        """Write the log now; returns once all that was logged before is in the store. Raises StoreError."""
        with self._writing:  # another thread may have taken the log and be writing it
            pass
        if self._unwritten or self._sums:
            with self._write_log():
                pass

    # --- private -----------------------------------------------------------------------------------------------------

    def _record(self, connection: Connection, told: Told) -> Recorded:
        receipt, unit, adapter = told.receipt, told.unit, told.adapter
        if (receipt is None) == (unit is None) or (unit is not None and adapter is None):
            raise BadExperiment("an outcome needs the receipt of its answer, or the unit and the adapter's name")
        experiment = rows.find(connection, check_name(adapter)) if adapter is not None else None
        return outcomes.record(connection, told.value, self._at(), receipt=receipt, unit=unit, experiment=experiment)

    def _running(self) -> dict[str, Experiment]:
        if self._known is None or self._clock() - self._read_at >= REFRESH:
            self.turn()
        return self._known or {}

    def _refresh(self, *, wait: bool = False) -> None:
        """Read running experiments in one thread; others continue with the known ones, if there are any."""
        if not self._reading.acquire(blocking=wait or self._known is None):
            return
        try:
            now = self._clock()
            if now - self._read_at < REFRESH and self._known is not None:
                return
            self._read_at = now
            mark = self._mark() if self._mark else None
            if mark is None or mark != self._read_mark:
                with self._database.reading() as connection:
                    running = rows.running_experiments(connection)
                self._max_seconds |= {each.id: each.guards.max_seconds for each in running}
                self._known, self._read_mark = {each.adapter: each for each in running}, mark
            self.problem = None
        except StoreError as error:
            self.problem = str(error)
            if self._known is None:
                self._read_at = float("-inf")
                raise  # nothing is known yet, so a caller must not assume that no experiment is running
        finally:
            self._reading.release()

    @contextmanager
    def _write_log(self) -> Iterator[Connection]:
        """A writing transaction that first writes the log. If it fails, the log is kept."""
        with self._writing:
            with self._lock:
                seen, sums = self._unwritten, self._sums
                self._unwritten, self._sums = [], {}
            try:
                with self._database.writing() as connection:
                    outcomes.log(connection, seen)
                    rows.keep_health(connection, sums, self._at())
                    yield connection
            except BaseException:
                with self._lock:
                    self._unwritten = [*seen, *self._unwritten]
                    for key, each in sums.items():
                        self._sums[key] = self._sums.get(key, ArmHealth()) + each
                raise

    def _add(self, assignment: Assignment, arm: str, seconds: float, error: bool, agrees: bool | None) -> None:
        bound = self._max_seconds.get(assignment.experiment_id)
        slow = bound is not None and seconds > bound
        this = ArmHealth(1, int(error), int(slow), seconds, int(agrees is not None), int(bool(agrees)))
        key = (assignment.experiment_id, arm)
        with self._lock:
            self._sums[key] = self._sums.get(key, ArmHealth()) + this

    def _at(self) -> str:
        return timestamp(self._clock())
