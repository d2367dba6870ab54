"""Evidence that an arm fails, or is slow, more often than its bound and more often than the control.

Both must hold, because an outage of all arms says nothing about a candidate. Answers are compared in blocks of one
time. A block ends when both arms have `LEAST` answers, or when the split changes. While the control gets no traffic,
the bound alone decides.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from turret.experiments import bounds, excess
from turret.experiments.arm_health import ArmHealth, HealthRow
from turret.experiments.e_process import EProcess

LEAST = 4  # answers of each arm in a block
KINDS = ("errors", "slow")
NOTHING = ArmHealth()


@dataclass
class Watched:
    """One arm against the control: the open block, and the evidence of the finished ones."""

    arm: ArmHealth = NOTHING
    control: ArmHealth = NOTHING
    alone: ArmHealth = NOTHING  # answers while the control got no traffic
    excess: dict[str, EProcess] = field(default_factory=lambda: {kind: EProcess.of(len(excess.ODDS)) for kind in KINDS})

    def end(self) -> None:
        """End the open block."""
        if self.arm.answers and self.control.answers:
            for kind, process in self.excess.items():
                bad, control_bad = getattr(self.arm, kind), getattr(self.control, kind)
                steps = excess.factors(bad, self.arm.answers, control_bad, self.control.answers)
                self.excess[kind] = process.through(steps[None])
        self.arm = self.control = NOTHING

    def evidence(self, kind: str, total: ArmHealth, bound: float) -> float:
        """Log evidence that a share of more than `bound` is bad, and a larger share than of the control."""
        both = min(_over(total, kind, bound), self.excess[kind].peak)
        return max(both, _over(self.alone, kind, bound))


@dataclass
class Watch:
    """All arms against the control; `read` adds rows."""

    control: str
    last: int = 0
    arms: dict[str, Watched] = field(default_factory=dict)
    sums: dict[str, ArmHealth] = field(default_factory=dict)  # arm -> all its answers
    _split: int = 0
    _control: ArmHealth = NOTHING  # answers of the control since the split: the block of an arm without answers

    def read(self, found: Sequence[HealthRow], splits: Sequence[tuple[str, Mapping[str, float]]]) -> None:
        """Add rows of `arm_health.rows`, in order and with all rows of a time together.

        Args:
            splits: start and weights of each split, oldest first.
        """
        begins = [at for at, _ in splits]
        place = 0
        while place < len(found):
            at, flush = found[place].at, dict[str, ArmHealth]()
            while place < len(found) and found[place].at == at:  # rows that one process wrote together
                row = found[place]
                seen = ArmHealth(row.answers, row.errors, row.slow, row.seconds, row.compared, row.agreed)
                flush[row.arm] = flush.get(row.arm, NOTHING) + seen
                self.last, place = row.id, place + 1
            split = max(bisect_right(begins, at) - 1, 0)
            self._add(flush, changed=split != self._split, alone=splits[split][1].get(self.control, 0.0) <= 0)
            self._split = split

    def _add(self, flush: Mapping[str, ArmHealth], *, changed: bool, alone: bool) -> None:
        if changed:
            self._control = NOTHING
        for arm, seen in flush.items():
            self.sums[arm] = self.sums.get(arm, NOTHING) + seen
            if arm != self.control:
                self.arms.setdefault(arm, Watched(control=self._control))
        control = flush.get(self.control, NOTHING)
        self._control += NOTHING if alone else control
        for arm, watched in self.arms.items():
            if changed:
                watched.end()
            seen = flush.get(arm, NOTHING)
            if alone:
                watched.alone += seen
                continue
            watched.arm, watched.control = watched.arm + seen, watched.control + control
            if min(watched.arm.answers, watched.control.answers) >= LEAST:
                watched.end()


def _over(seen: ArmHealth, kind: str, bound: float) -> float:
    return bounds.evidence(getattr(seen, kind), seen.answers, bound) if seen.answers else -math.inf
