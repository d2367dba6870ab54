"""Detect when an arm starts to fail, or to be slow, more often than its bound and more often than the control.

Both must hold, because an outage of all arms says nothing about a candidate. A candidate may work for days and then
break, so this is a detector of a change (Shin, Ramdas & Rinaldo, "E-detectors: a nonparametric framework for sequential
change detection", 2023), not a test of the whole experiment.

Answers are compared in blocks of one time. A block ends when both arms have `LEAST` answers, or when the split changes.
In a block the arm has n1 answers of which s1 are bad, the control n0 and s0. Two factors are not expected to exceed 1:

    over the bound b:     B_q = (q / b)^s1 ((1 - q) / (1 - b))^(n1 - s1)     if each answer is bad with at most b; q > b
    over the control:     C_w = w^s1 / sum_u P(U = u) w^u,  w > 1            if the arm fails no more than the control
                          U: hypergeometric(n1, n0, s1 + s0), the law of s1 if both fail alike (Fisher 1935)

So min(B_q, C_w) is not expected to exceed 1 in a block in which the arm is within its bound, or no worse than the
control. While the control gets no traffic, B_q alone counts. The detector is a mean over the pairs (q, w) of

    M <- (M + hours since the last block) min(B_q, C_w),    M = START at first

It sums the evidence over all times at which the failures may have begun. As long as each block is as above, M - hours
is not expected to grow. So by Doob's inequality

    P(M reaches `NEEDED` within T hours) <= (T + START) / NEEDED

In words: at most one false alarm in `NEEDED` hours. The first hour counts as `START` hours, because a new version most
often fails at once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache

import numpy as np
from scipy.special import gammaln, logsumexp

from turret.experiments.rows import ArmHealth, HealthRow
from turret.statistics import Floats, log_mean

NEEDED = 10_000.0  # hours: the mean time to a false alarm is at least this
START = 24.0  # hours
LEAST = 4  # answers of each arm in a block
ODDS = np.array([2.0, 4.0, 16.0, 64.0])  # of q against b, and w
# An arm over its bound fails even more often than a control within it: pairs (q, w) with w at least as large.
Q, W = (np.array(each) for each in zip(*[(q, w) for q in range(4) for w in range(q, 4)], strict=True))
MIDDLE = int(np.flatnonzero((Q == 1) & (W == 1))[0])
NOTHING = ArmHealth()


@lru_cache(maxsize=4096)
def log_over_bound(bad: int, total: int, bound: float) -> Floats:
    """log B_q for each odds ratio: (len(ODDS),)."""
    odds = bound / (1 - bound) * ODDS
    q = odds / (1 + odds)
    return np.asarray(bad * np.log(q / bound) + (total - bad) * np.log((1 - q) / (1 - bound)))


@lru_cache(maxsize=4096)
def log_over_control(bad: int, total: int, control_bad: int, control_total: int) -> Floats:
    """log C_w for each odds ratio: (len(ODDS),)."""
    s = bad + control_bad
    least, most = max(0, s - control_total), min(s, total)
    if least == most:  # all or none are bad, or one arm has no answers
        return np.zeros(len(ODDS))
    u = np.arange(least, most + 1, dtype=np.float64)
    chances = _log_choose(total, u) + _log_choose(control_total, s - u) - _log_choose(total + control_total, s)
    grown = logsumexp(chances[:, None] + u[:, None] * np.log(ODDS), axis=0)
    return np.asarray(bad * np.log(ODDS) - grown)


def _log_choose(n: int, k: Floats | int) -> Floats:
    return np.asarray(gammaln(n + 1) - gammaln(np.asarray(k) + 1) - gammaln(n - np.asarray(k) + 1))


@dataclass
class Detector:
    """The evidence that one arm has started to give more bad answers of one kind.

    Args:
        kind: `errors` or `slow`.
        bound: the share of bad answers that is allowed.
    """

    kind: str
    bound: float
    peak: float = -math.inf  # the highest log M so far
    arm: ArmHealth = NOTHING  # answers since the failures probably began
    control: ArmHealth = NOTHING
    _logs: Floats = field(default_factory=lambda: np.full(len(Q), math.log(START)))
    _since: float = 0.0  # of the pair with odds of 4, the log product since the failures probably began (CUSUM)

    def after(self, arm: ArmHealth, control: ArmHealth, hours: float) -> None:
        """Add one block.

        Args:
            arm: the answers of the arm, at least one.
            control: those of the control; `NOTHING` while it gets no traffic.
            hours: the time from the end of the block before the last to the end of the last one.
        """
        steps = log_over_bound(getattr(arm, self.kind), arm.answers, self.bound)[Q]
        if control.answers:
            more = log_over_control(getattr(arm, self.kind), arm.answers, getattr(control, self.kind), control.answers)
            steps = np.minimum(steps, more[W])
        if hours > 0:
            self._logs = np.logaddexp(self._logs, math.log(hours))
        self._logs = self._logs + steps
        if not self.alarm:
            self._since = max(self._since + float(steps[MIDDLE]), 0.0)
            fresh = self._since == 0.0
            self.arm = NOTHING if fresh else self.arm + arm
            self.control = NOTHING if fresh else self.control + control
        self.peak = max(self.peak, float(log_mean(self._logs[None])[0]))

    @property
    def alarm(self) -> bool:
        """Whether the arm has failed more than it may; stays True."""
        return self.peak >= math.log(NEEDED)


@dataclass
class Watched:
    """One arm against the control: the open block, and a detector for each guard."""

    detectors: tuple[Detector, ...]
    control: ArmHealth = NOTHING
    arm: ArmHealth = NOTHING
    ended: float | None = None  # when the last block ended, in seconds
    hours: float = 0.0  # the length of the last block

    def end(self, at: float, *, alone: bool = False) -> None:
        """End the open block.

        Args:
            at: the time, in seconds.
            alone: the control got no traffic.
        """
        if self.arm.answers and (self.control.answers or alone):
            for detector in self.detectors:
                detector.after(self.arm, NOTHING if alone else self.control, self.hours)
            self.hours = max(at - self.ended, 0.0) / 3600 if self.ended is not None else 0.0
            self.ended = at
        self.arm = self.control = NOTHING


@dataclass
class Watch:
    """All arms against the control; `read` adds rows.

    Args:
        control: the name of the control.
        bounds: `errors` and `slow` -> the share of an arm's answers that may be so. Without a bound nothing is watched.
    """

    control: str
    bounds: Mapping[str, float]
    last: int = 0
    arms: dict[str, Watched] = field(default_factory=dict)
    sums: dict[str, ArmHealth] = field(default_factory=dict)  # arm -> all its answers
    _split: int = 0
    _control: ArmHealth = NOTHING  # answers of the control since the split: the block of an arm without answers

    def read(self, found: Sequence[HealthRow], splits: Sequence[tuple[str, Mapping[str, float]]]) -> None:
        """Add rows of `rows.health_rows`, in order and with all rows of a time together.

        Args:
            splits: start and weights of each split, oldest first.
        """
        begins = [at for at, _ in splits]
        place = 0
        while place < len(found):
            at, flush = found[place].at, dict[str, ArmHealth]()
            while place < len(found) and found[place].at == at:  # rows that one process wrote together
                row = found[place]
                flush[row.arm] = flush.get(row.arm, NOTHING) + row.seen
                self.last, place = row.id, place + 1
            split = max(bisect_right(begins, at) - 1, 0)
            changed, alone = split != self._split, splits[split][1].get(self.control, 0.0) <= 0
            self._add(flush, datetime.fromisoformat(at).timestamp(), changed=changed, alone=alone)
            self._split = split

    def _add(self, flush: Mapping[str, ArmHealth], at: float, *, changed: bool, alone: bool) -> None:
        if changed:
            self._control = NOTHING
        for arm, seen in flush.items():
            self.sums[arm] = self.sums.get(arm, NOTHING) + seen
            if arm != self.control and arm not in self.arms:
                detectors = tuple(Detector(kind, bound) for kind, bound in self.bounds.items())
                self.arms[arm] = Watched(detectors, control=self._control)
        control = NOTHING if alone else flush.get(self.control, NOTHING)
        self._control += control
        for arm, watched in self.arms.items():
            if changed:
                watched.end(at)
            watched.arm, watched.control = watched.arm + flush.get(arm, NOTHING), watched.control + control
            if watched.arm.answers >= LEAST and (alone or watched.control.answers >= LEAST):
                watched.end(at, alone=alone)
