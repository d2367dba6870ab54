"""Which version answers a request, on this process: the one object that a server asks. No torch, no numpy, no clock.

Cheap enough to ask for every request: what runs is read once a second, an assignment is a hash and a look-up, and
what is to be logged is written in one transaction a second. Both happen in `turn`, which a server calls from a thread
of its own; an `assign` does it where nobody did for a second. Safe to use from several threads.

A process that is killed loses the log of its last second; the assignment itself is lost by nobody, because it follows
from the unit. While the store cannot be reached, the experiments that were known go on and the log is kept, up to
`MOST_KEPT` answers; `problem` says why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection

from turret.database import Database
from turret.errors import BadExperiment, BadReference, NotFound, StoreError
from turret.experiments import arm_health, assign, outcomes, rows
from turret.experiments.arm_health import ArmHealth
from turret.experiments.experiment import Experiment
from turret.experiments.outcomes import Recorded, Seen, check_receipt
from turret.reference import check_name

REFRESH = 1.0  # seconds that what is known may be old, and that a log may be unwritten
MOST_KEPT = 100_000  # answers, while the store cannot be reached


@dataclass(frozen=True)
class Assignment:
    """The version that answers, and the arm and probability that it was chosen with."""

    version: str  # "news@2"
    arm: str
    probability: float
    experiment: str  # "news#1"
    shadows: tuple[tuple[str, str], ...]  # arm and version of those that are run beside and never returned
    experiment_id: int
    unit: str  # hashed
    revision: int  # of the split


@dataclass(frozen=True)
class Told:
    """An outcome as somebody tells it: of the answer with this receipt, or of a unit of the adapter's experiment."""

    value: object
    receipt: str | None = None
    unit: str | None = None
    adapter: str | None = None


class Router:
    """Experiments as this process sees them.

    clock: seconds since 1970; its time is what is logged.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database, self._clock = database, clock
        self._lock = threading.Lock()  # of what is in memory; held for moments
        self._reading, self._writing = threading.Lock(), threading.Lock()  # held by who is at the store
        self._known: dict[str, Experiment] | None = None
        self._slow: dict[int, float | None] = {}  # experiment -> its bound on seconds
        self._read = float("-inf")
        self._unwritten: list[Seen] = []
        self._sums: dict[tuple[int, str], ArmHealth] = {}
        self.problem: str | None = None  # why the store could not be reached
        self.lost = 0  # answers that could not be logged

    def running(self, name: str) -> Experiment | None:
        """The experiment that runs on the name; its `unit` says what is to be assigned: user, session or request."""
        return self._running().get(name)

    def all_running(self) -> list[Experiment]:
        return list(self._running().values())

    def assign(self, name: str, unit: str, receipt: str | None = None) -> Assignment | None:
        """Which version answers this unit, logged; None where no experiment runs on the name.

        unit: whoever the experiment counts, such as a user's id (`running` says which); it is kept as a hash only.
        receipt: the id of the answer, which its outcome is told by.
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
        """As `assign`, for who knows the answer's id only later: `log` must follow, whatever becomes of the answer."""
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
        """Note that the unit was sent to its arm; written within a second."""
        seen = Seen(found.experiment_id, found.unit, found.arm, found.revision, found.probability, self._at(), receipt)
        with self._lock:
            if len(self._unwritten) >= MOST_KEPT:
                self.lost += 1
                return
            self._unwritten.append(seen)

    def answered(self, assignment: Assignment, *, seconds: float, error: bool = False) -> None:
        """Add an answer of the arm to what is known of its errors and latency."""
        self._add(assignment, assignment.arm, seconds, error, None)

    def shadowed(
        self, assignment: Assignment, arm: str, *, seconds: float, error: bool = False, agrees: bool | None = None
    ) -> None:
        """Add what a shadow did beside the answer; agrees: whether it said the same."""
        self._add(assignment, arm, seconds, error, agrees)

    def outcome(
        self, value: object, *, receipt: str | None = None, unit: str | None = None, name: str | None = None
    ) -> Recorded:
        """Record what came of an answer: by its receipt, or by the unit and the adapter's name."""
        told = Told(value, receipt, unit, name)
        with self._written() as connection:
            return self._record(connection, told)

    def outcomes(self, told: Sequence[Told]) -> list[Recorded]:
        """The same for many, in one transaction; of a name that has no experiment an outcome is `unknown`."""
        found: list[Recorded] = []
        with self._written() as connection:
            for each in told:
                try:
                    found.append(self._record(connection, each))
                except (NotFound, BadReference) as error:
                    found.append(Recorded("unknown", str(error)))
        return found

    def turn(self) -> None:
        """Read what runs and write the log, once a second; what goes wrong is in `problem`."""
        self._refresh()
        try:
            self.flush()
        except StoreError as error:
            self.problem = str(error)

    def look(self) -> None:
        """Read what runs now, however lately it was read."""
        with self._lock:
            self._read = float("-inf")
        self._refresh(wait=True)

    def flush(self) -> None:
        """Write what is not written yet; raises StoreError."""
        if self._unwritten or self._sums:
            with self._written():
                pass

    # --- the inside --------------------------------------------------------------------------------------------------

    def _record(self, connection: Connection, told: Told) -> Recorded:
        receipt, unit, adapter = told.receipt, told.unit, told.adapter
        if (receipt is None) == (unit is None) or (unit is not None and adapter is None):
            raise BadExperiment("an outcome needs the receipt of its answer, or the unit and the adapter's name")
        experiment = rows.find(connection, check_name(adapter)) if adapter is not None else None
        return outcomes.record(connection, told.value, self._at(), receipt=receipt, unit=unit, experiment=experiment)

    def _running(self) -> dict[str, Experiment]:
        if self._known is None or self._clock() - self._read >= REFRESH:
            self.turn()
        return self._known or {}

    def _refresh(self, *, wait: bool = False) -> None:
        """Read what runs. One thread does; the others go on with what was known, where something was."""
        if not self._reading.acquire(blocking=wait or self._known is None):
            return
        try:
            now = self._clock()
            if now - self._read < REFRESH and self._known is not None:
                return
            self._read = now
            with self._database.reading() as connection:
                running = rows.all_running(connection)
            self._slow |= {each.id: each.guards.max_seconds for each in running}
            self._known = {each.adapter: each for each in running}
            self.problem = None
        except StoreError as error:
            self.problem = str(error)
            if self._known is None:
                self._read = float("-inf")
                raise  # nothing is known yet: whoever asks must not be answered as if nothing ran
        finally:
            self._reading.release()

    @contextmanager
    def _written(self) -> Iterator[Connection]:
        """A transaction that begins with the log; where it fails, the log is kept."""
        with self._writing:
            with self._lock:
                seen, sums = self._unwritten, self._sums
                self._unwritten, self._sums = [], {}
            try:
                with self._database.writing() as connection:
                    outcomes.log(connection, seen)
                    arm_health.keep(connection, sums, self._at())
                    yield connection
            except BaseException:
                with self._lock:
                    self._unwritten = [*seen, *self._unwritten]
                    for key, each in sums.items():
                        self._sums[key] = self._sums.get(key, ArmHealth()) + each
                raise

    def _add(self, assignment: Assignment, arm: str, seconds: float, error: bool, agrees: bool | None) -> None:
        bound = self._slow.get(assignment.experiment_id)
        slow = bound is not None and seconds > bound
        this = ArmHealth(1, int(error), int(slow), seconds, int(agrees is not None), int(bool(agrees)))
        key = (assignment.experiment_id, arm)
        with self._lock:
            self._sums[key] = self._sums.get(key, ArmHealth()) + this

    def _at(self) -> str:
        return said(self._clock())


def said(seconds: float) -> str:
    """A time as the store keeps it: ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
