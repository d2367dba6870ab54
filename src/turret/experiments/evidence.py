"""Evidence from the outcomes of one candidate and the control, valid at any time.

The n-th unit is of the candidate (a = 1) or of the control (a = 0). y in [0, 1] is its outcome; more is better. pi is
the logged probability of the candidate, out of these two arms. m, q and lambda are computed before the n-th outcome.
Three processes start at 1 and are not expected to grow under their null hypothesis:

**better, worse, of a binary outcome** (exact; Turner, Ly & Gruenwald, "Generic e-variables for exact sequential
k-sample tests", 2024, with logged probabilities; Grunwald, de Heide & Koolen, "Safe testing", 2024):

    E_n = mean over d of  prod_i  q_a(y_i) / p0(y_i)       p0 = pi q_1 + (1 - pi) q_0
    q_1, q_0: Bernoulli with log odds  logit(m) + d (1 - pi),  logit(m) - d pi;  m: the mean of both arms so far

    better: d > 0, and E is a test supermartingale if no unit's probability is higher with the candidate; worse: d < 0.
    (For d > 0 the expected factor of a unit falls with its probability under the control and rises with that under the
    candidate. If both are equal it is sum_a pi_a q_a(y) / p0(y) = 1, for any probability. So the probability may drift,
    and pi may change.)

**better, worse by more than a margin** (exact; betting; Waudby-Smith & Ramdas, "Estimating means of bounded random
variables by betting", 2024), for any y in [0, 1]:

    z = (a - pi)(y - m)      h = pi (1 - pi)      E[z | past] = h (mean of the candidate - mean of the control)
    E_n = mean over lambda of  prod_i  1 + lambda s_i
    better: s = z;  worse by more than delta: s = -(z + h delta);  lambda is so small that no factor reaches 0

**interval** (a confidence sequence; empirical Bernstein; Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform,
nonparametric, nonasymptotic confidence sequences", 2021), for any y in [0, 1]. With c, the most that |z| can be, and K
lambdas between 0 and 1, which are not chosen by the outcomes:

    D +- min over lambda of  (log(2 K / alpha) + psi V) / (lambda sum h / c)      psi = -log(1 - lambda) - lambda
    D = (sum z / c) / (sum h / c)      V = sum (z / c)^2

    (A factor exp(lambda (z - E[z | past]) / c - psi (z / c)^2) is not expected to exceed 1. If the difference changes,
    the interval is about its mean, in which a unit has the weight h / c.)

**better, worse, even if a share beta of each arm's units is hidden** because of what their outcomes would be: the worst
case for `better` is that all hidden outcomes of the candidate are 0 and all of the control are 1. Then the means of all
units are those of y', and the bets above on y' instead of y are evidence about them:

    y' = (1 - beta) y  of the candidate,   y' = (1 - beta) y + beta  of the control;   for `worse` the other way round

The tipping point is the largest beta at which this evidence still decides. Nothing in the data says how many outcomes
are hidden in this way; a person must (Manski, "Partial identification of probability distributions", 2003).

By Ville's inequality, under the null P(E ever reaches 1/alpha) <= alpha. So it may be looked at after each outcome, and
the experiment may stop at any time. `peak`, the highest evidence so far, does not depend on when that was done.
Equality is tested by (better + worse) / 2. A unit counts once, by its first outcome.

**After a verdict** its process continues, and both processes also start from scratch with the later outcomes. The
verdict has turned if its process has fallen back to 1, or if the later outcomes decide for the other side. If the
effect stays the same, the inverse of a likelihood ratio is a martingale too: evidence of 40 is lost in 1 case of 40.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from turret.statistics import EProcess, Floats

SHIFTS = np.array([0.05, 0.1, 0.2, 0.4, 0.8, 1.6])  # of log odds
BETS = np.array([0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2])  # lambda
MOST_BET = 0.9  # of the bet that could lose everything
SLOPES = 0.8 / 2.0 ** np.arange(10)  # lambda of the interval, for up to some million units
COSTS = -np.log1p(-SLOPES) - SLOPES  # psi
HIDDEN = (0.01, 0.02, 0.05, 0.1, 0.2)  # beta: shares of the units of an arm
HIDDEN_BETS = BETS[1::2]  # fewer, because there are many processes
Side = Literal["better", "worse"]


@dataclass(frozen=True)
class OutcomeTally:
    """Sufficient statistics of the outcomes of a candidate and the control. Immutable; see `after`."""

    binary: bool
    margin: float  # of the guard, as a fraction of the metric's range
    better: EProcess
    worse: EProcess
    worse_by: EProcess
    counts: tuple[int, int] = (0, 0)  # control, candidate
    sums: tuple[float, float] = (0.0, 0.0)
    z: float = 0.0  # sums over the units: of z / c, h / c and (z / c)^2
    h: float = 0.0
    zz: float = 0.0
    decides: float = math.inf  # log evidence that gives a verdict
    verdict: Side | None = None  # the first that was reached
    since: OutcomeTally | None = None  # of the outcomes after the verdict
    hidden: Mapping[Side, tuple[EProcess, ...]] = field(default_factory=dict)  # one process for each of `HIDDEN`

    @classmethod
    def empty(
        cls, *, binary: bool, margin: float | None, decides: float = math.inf, hides: bool = True
    ) -> OutcomeTally:
        """A tally without outcomes.

        Args:
            margin: None if the guard is off; then `worse_by` is `worse`, as for a margin of 0.
            decides: log evidence that gives a verdict.
            hides: keep the processes of `HIDDEN`. Without them `tipping` is always 0.
        """
        start = EProcess.of(len(SHIFTS if binary else BETS))
        hidden: dict[Side, tuple[EProcess, ...]] = {
            side: (EProcess.of(len(HIDDEN_BETS)),) * len(HIDDEN) for side in ("better", "worse") if hides
        }
        return cls(
            binary,
            margin or 0.0,
            start,
            start,
            EProcess.of(len(BETS)) if margin else start,
            decides=decides,
            hidden=hidden,
        )

    def after(self, arm: NDArray[np.int64], y: Floats, share: Floats) -> OutcomeTally:
        """The tally with more outcomes, in the order in which they came.

        Args:
            arm: 1 for the candidate, 0 for the control, (N,).
            y: outcomes in [0, 1], (N,).
            share: pi, (N,).
        """
        real = (share > 0) & (share < 1)  # while one arm had no traffic there is nothing to compare
        arm, y, share = arm[real], y[real], share[real]
        if not len(y):
            return self
        m = self._means(y)
        z, h = (arm - share) * (y - m), share * (1 - share)
        up, down = _largest_gains(m, share)  # the largest possible z and -z
        c = np.maximum(up, down)
        if self.binary:
            better, worse = (_odds(arm, y, share, m, sign * SHIFTS) for sign in (1.0, -1.0))
        else:
            better, worse = _bets(z, down), _bets(-z, up)
        by_margin = _bets(-(z + h * self.margin), up + h * self.margin) if self.margin else worse
        verdict, since = self._verdict_after(arm, y, share, better, worse)
        counts, sums = [int((arm == a).sum()) for a in (0, 1)], [float(y[arm == a].sum()) for a in (0, 1)]
        return replace(
            self,
            better=self.better.through(better),
            worse=self.worse.through(worse),
            worse_by=self.worse_by.through(by_margin),
            counts=(self.counts[0] + counts[0], self.counts[1] + counts[1]),
            sums=(self.sums[0] + sums[0], self.sums[1] + sums[1]),
            z=self.z + float((z / c).sum()),
            h=self.h + float((h / c).sum()),
            zz=self.zz + float(((z / c) ** 2).sum()),
            verdict=verdict,
            since=since,
            hidden={side: self._despite_hidden(side, arm, y, share, m) for side in self.hidden},
        )

    def _despite_hidden(
        self, side: Side, arm: NDArray[np.int64], y: Floats, share: Floats, m: Floats
    ) -> tuple[EProcess, ...]:
        """The processes of one side after these outcomes, for each share of hidden units."""
        found = []
        for beta, process in zip(HIDDEN, self.hidden[side], strict=True):
            raised = arm == (0 if side == "better" else 1)  # the arm whose hidden outcomes are all 1
            centre = (1 - beta) * m + beta / 2
            gain = (arm - share) * ((1 - beta) * y + beta * raised - centre)
            up, down = _largest_gains(centre, share)
            found.append(
                process.through(_bets(gain, down, HIDDEN_BETS) if side == "better" else _bets(-gain, up, HIDDEN_BETS))
            )
        return tuple(found)

    def tipping(self, side: Side) -> float:
        """The largest share of hidden units despite which the outcomes decide for this side; 0 if none is."""
        return max(
            (
                beta
                for beta, process in zip(HIDDEN, self.hidden.get(side, ()), strict=False)
                if process.peak >= self.decides
            ),
            default=0.0,
        )

    def _verdict_after(
        self, arm: NDArray[np.int64], y: Floats, share: Floats, better: Floats, worse: Floats
    ) -> tuple[Side | None, OutcomeTally | None]:
        """The verdict after these outcomes, and the tally of the outcomes after the verdict."""
        if self.since is not None:
            return self.verdict, self.since.after(arm, y, share)
        first = [process.first(steps, self.decides) for process, steps in ((self.better, better), (self.worse, worse))]
        end = min(first)
        if end == len(y):
            return None, None
        fresh = OutcomeTally.empty(binary=self.binary, margin=None, hides=False)
        rest = slice(end + 1, None)
        return "better" if first[0] == end else "worse", fresh.after(arm[rest], y[rest], share[rest])

    @property
    def turned(self) -> bool:
        """Whether the outcomes after the verdict have reversed it."""
        if self.since is None:
            return False
        mine, other = (self.better, self.since.worse) if self.verdict == "better" else (self.worse, self.since.better)
        return mine.now <= 0 or other.peak >= self.decides

    def _means(self, y: Floats) -> Floats:
        """m: the mean of both arms before each outcome, starting with half an outcome; (N,)."""
        before = np.cumsum(y) - y + sum(self.sums)
        return (before + 0.5) / (np.arange(len(y)) + sum(self.counts) + 1.0)

    @property
    def difference(self) -> float | None:
        """Mean of the candidate minus mean of the control, as a fraction of the range; None if one has no outcome."""
        return self.z / self.h if min(self.counts) > 0 else None

    def equality(self, hidden: float = 0.0) -> float:
        """The current log evidence against equal arms, even if this share of the units of each arm is hidden.

        Args:
            hidden: 0, or one of `HIDDEN`.
        """
        place = HIDDEN.index(hidden) if hidden else None
        better, worse = (
            (self.better, self.worse) if place is None else (self.hidden["better"][place], self.hidden["worse"][place])
        )
        return float(np.logaddexp(better.now, worse.now)) - math.log(2)

    def interval(self, alpha: float) -> tuple[float, float] | None:
        """A confidence sequence for the difference; None until both arms have outcomes.

        Args:
            alpha: the share of experiments in which the difference is ever outside.
        """
        if (d := self.difference) is None:
            return None
        half = float(((math.log(2 * len(SLOPES) / alpha) + COSTS * self.zz) / SLOPES).min()) / self.h
        low, high = np.clip((d - half, d + half), -1.0, 1.0)
        return float(low), float(high)


def _odds(arm: NDArray[np.int64], y: Floats, share: Floats, m: Floats, shifts: Floats) -> Floats:
    """log q_a(y) / p0(y), one column per shift: (N, shifts)."""
    centre = np.log(m / (1 - m))[:, None]
    pi, seen = share[:, None], y[:, None] > 0.5
    q1, q0 = (1 / (1 + np.exp(-(centre + part * shifts))) for part in (1 - pi, -pi))
    q, p = np.where(arm[:, None] == 1, q1, q0), pi * q1 + (1 - pi) * q0
    return np.where(seen, np.log(q / p), np.log((1 - q) / (1 - p)))


def _largest_gains(m: Floats, share: Floats) -> tuple[Floats, Floats]:
    return np.maximum((1 - share) * (1 - m), share * m), np.maximum((1 - share) * m, share * (1 - m))


def _bets(gain: Floats, most_loss: Floats, bets: Floats = BETS) -> Floats:
    """log(1 + lambda gain), one column per bet: (N, bets)."""
    most = np.minimum(bets[None, :], MOST_BET / most_loss[:, None])
    return np.asarray(np.log1p(most * gain[:, None]))


# --- discoveries among many experiments -------------------------------------------------------------------------------


def find_discoveries(evidence: Mapping[str, float], alpha: float) -> frozenset[str]:
    """The names of the discoveries among many experiments, with a bound on the false discovery rate (e-BH).

    Of K e-values e_(1) >= e_(2) >= ..., name the k largest, for the largest k with e_(k) >= K / (k alpha). The expected
    share of false discoveries is at most alpha, however the experiments depend on each other.

    A verdict at 1 / alpha is rarely a discovery among many experiments: of 20 with 4 real differences, each of these
    needs 20 / (4 alpha). So an experiment that ends automatically continues until it reaches `evidence_needed`.

    Source: Wang & Ramdas, "False discovery rate control with e-values", 2022.

    Args:
        evidence: the log e-value of each experiment, as it is now and not at its peak.
    """
    order = sorted(evidence, key=lambda name: -evidence[name])
    best = 0
    for k, name in enumerate(order, start=1):
        if evidence[name] >= math.log(len(order) / (k * alpha)):
            best = k
    return frozenset(order[:best])


def evidence_needed(others: Sequence[float], alpha: float) -> float:
    """The log e-value with which one more experiment would be a discovery, besides these."""
    experiments = len(others) + 1
    order = sorted(others, reverse=True)
    levels = (math.log(experiments / (k * alpha)) for k in range(experiments, 0, -1))
    return next(
        level for k, level in zip(range(experiments, 0, -1), levels, strict=True) if k == 1 or order[k - 2] >= level
    )
