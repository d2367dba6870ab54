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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection

from turret.database import Database
from turret.errors import BadExperiment, StoreError
from turret.experiments import assign, health, outcomes, rows
from turret.experiments.experiment import Experiment
from turret.experiments.health import Answering
from turret.experiments.outcomes import Recorded, Seen, check_receipt

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
        self._sums: dict[tuple[int, str], Answering] = {}
        self.problem: str | None = None  # why the store could not be reached
        self.lost = 0  # answers that could not be logged

    def assign(self, name: str, unit: str, receipt: str | None = None) -> Assignment | None:
        """Which version answers this unit, logged; None where no experiment runs on the name.

        unit: whoever the experiment counts, such as a user's id (`unit_of` says which); it is kept as a hash only.
        receipt: the id of the answer, which its outcome is told by.
        """
        if receipt is not None:
            check_receipt(receipt)
        experiment = self._running().get(name)
        if experiment is None:
            return None
        key = assign.key_of(experiment.salt, unit)
        arm = experiment.arm(assign.arm_at(experiment.segments, assign.point_of(key)))
        chance = experiment.weights[arm.name]
        self._log(Seen(experiment.id, key, arm.name, experiment.revision, chance, self._at(), receipt))
        shadows = tuple((each.name, experiment.reference(each)) for each in experiment.shadows)
        return Assignment(experiment.reference(arm), arm.name, chance, str(experiment), shadows, experiment.id)

    def unit_of(self, name: str) -> str | None:
        """What the running experiment of the name counts: user, session or request; None where none runs."""
        experiment = self._running().get(name)
        return None if experiment is None else experiment.unit

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
        if (receipt is None) == (unit is None) or (unit is not None and name is None):
            raise BadExperiment("an outcome needs the receipt of its answer, or the unit and the adapter's name")
        with self._written() as connection:
            experiment = rows.find(connection, name) if name is not None else None
            return outcomes.record(connection, value, self._at(), receipt=receipt, unit=unit, experiment=experiment)

    def turn(self) -> None:
        """Read what runs and write the log, once a second; what goes wrong is in `problem`."""
        self._refresh()
        try:
            self.flush()
        except StoreError as error:
            self.problem = str(error)

    def flush(self) -> None:
        """Write what is not written yet; raises StoreError."""
        if self._unwritten or self._sums:
            with self._written():
                pass

    # --- the inside --------------------------------------------------------------------------------------------------

    def _running(self) -> dict[str, Experiment]:
        if self._known is None or self._clock() - self._read >= REFRESH:
            self.turn()
        return self._known or {}

    def _refresh(self) -> None:
        """Read what runs. One thread does; the others go on with what was known, where something was."""
        if not self._reading.acquire(blocking=self._known is None):
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
                    health.keep(connection, sums, self._at())
                    yield connection
            except BaseException:
                with self._lock:
                    self._unwritten = [*seen, *self._unwritten]
                    for key, each in sums.items():
                        self._sums[key] = self._sums.get(key, Answering()) + each
                raise

    def _log(self, seen: Seen) -> None:
        with self._lock:
            if len(self._unwritten) >= MOST_KEPT:
                self.lost += 1
                return
            self._unwritten.append(seen)

    def _add(self, assignment: Assignment, arm: str, seconds: float, error: bool, agrees: bool | None) -> None:
        bound = self._slow.get(assignment.experiment_id)
        slow = bound is not None and seconds > bound
        this = Answering(1, int(error), int(slow), seconds, int(agrees is not None), int(bool(agrees)))
        key = (assignment.experiment_id, arm)
        with self._lock:
            self._sums[key] = self._sums.get(key, Answering()) + this

    def _at(self) -> str:
        return said(self._clock())


def said(seconds: float) -> str:
    """A time as the store keeps it: ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
