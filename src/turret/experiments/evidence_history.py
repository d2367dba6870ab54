"""How the evidence of an experiment grew: a point after every so many outcomes, for plots.

With `2 * POINTS` points every second one is dropped, so the number stays bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection

from turret.experiments import outcomes, rows
from turret.experiments.analyze import Against, Memory, against
from turret.experiments.experiment import Experiment

POINTS = 200


@dataclass(frozen=True)
class EvidencePoint:
    """What was known after `outcomes` of them had counted."""

    outcomes: int
    at: str  # time of the last of them
    means: Mapping[str, float | None]  # arm -> mean outcome
    against: Mapping[str, Against]  # of each candidate


@dataclass
class EvidenceHistory:
    """The points of one experiment so far. Safe to use from several threads."""

    points: list[EvidencePoint] = field(default_factory=list)
    _memory: Memory = field(default_factory=lambda: Memory(hides=False))  # a plot shows no tipping point
    _every: int = 1  # outcomes per point
    _seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, connection: Connection, experiment: Experiment) -> None:
        """Add new outcomes from the store."""
        with self._lock:
            split = rows.probabilities(connection, experiment)
            found = outcomes.counted(connection, experiment, self._memory.last)
            while found:
                some, found = found[: self._every], found[self._every :]
                self._memory.add(experiment, split, some)
                self._seen += len(some)
                self.points.append(self._point(experiment, some[-1].at))
                if len(self.points) >= 2 * POINTS:
                    self.points, self._every = self.points[1::2], 2 * self._every

    def _point(self, experiment: Experiment, at: str) -> EvidencePoint:
        means = {arm.name: self._memory.mean(arm.name) for arm in experiment.arms}
        known = {arm.name: against(experiment, arm, self._memory, void=False) for arm in experiment.candidates}
        return EvidencePoint(self._seen, at, means, known)
