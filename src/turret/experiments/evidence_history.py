"""How the evidence of an experiment grew: what was known after each so many outcomes.

A `Course` is added to as outcomes come; beyond twice `POINTS` every other point goes, so that it stays small.
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
    at: str  # when the last of them came
    means: Mapping[str, float | None]  # arm -> mean outcome
    against: Mapping[str, Against]  # of each candidate


@dataclass
class EvidenceHistory:
    """The points so far, of one experiment; may be asked by several threads."""

    points: list[EvidencePoint] = field(default_factory=list)
    _memory: Memory = field(default_factory=Memory)
    _every: int = 1  # outcomes a point
    _seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, connection: Connection, experiment: Experiment) -> None:
        """Add the outcomes that are new."""
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
        counts: dict[str, int] = {}
        for split in self._memory.counts.values():
            for arm, count in split.items():
                counts[arm] = counts.get(arm, 0) + count
        means = {arm.name: _mean(self._memory.sums.get(arm.name), counts.get(arm.name)) for arm in experiment.arms}
        known = {arm.name: against(experiment, arm, self._memory, void=False) for arm in experiment.candidates}
        return EvidencePoint(self._seen, at, means, known)


def _mean(total: float | None, count: int | None) -> float | None:
    return total / count if total is not None and count else None
