"""Checks whether the arms can be compared at all: their numbers of units, of missing outcomes, and of late outcomes.

If the arm has no effect on who comes, on whether an outcome is sent and on how long that takes, then the units of each
of these classes fall on the arms as planned (`turret.experiments.validity`):

- units: all units, when they are first answered
- outcomes: units with an outcome, and units without one after the time to live
- delays: units with an outcome, by its delay, in classes that are each four times as wide as the one before

An alarm is permanent, because the evidence counts at its peak. The three checks share one level.

No check detects other outcomes of the same number and delay. If bad outcomes of one arm are replaced by good ones of
other units, that arm looks better.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate

import numpy as np
from sqlalchemy import Connection

from turret.experiments import outcomes
from turret.experiments.experiment import Experiment, seconds_between
from turret.experiments.outcomes import CountedOutcome, FirstAnswer
from turret.statistics import EProcess, Floats
from turret.timestamp import timestamp

# --- sample ratio -----------------------------------------------------------------------------------------------------
# A sequential test for sample ratio mismatch: whether each arm gets its planned share of the units.
#
# Under the null, a unit of stratum r is in arm a with probability pi[r, a], whatever came before. The alternative is a
# mixture of shares: for each stratum a Dirichlet with mean pi[r] and concentration k. The likelihood ratio has one
# factor per unit:
#
#     E_n = mean over k of  prod_i  (k pi_a + n_a) / ((k + n) pi_a)      n, n_a: earlier units of the stratum, in arm a
#
# Strata may be any classes on which the arm has no effect: revisions of the split, or how late an outcome came.
#
# Source: Lindon & Malek, "Anytime-valid inference for multinomial count data", 2022.


CONCENTRATIONS = np.array([10.0, 100.0, 1000.0, 10000.0])
CERTAIN = 1000.0  # log factor of a unit in an arm that gets no traffic

Stratum = tuple[int, int]  # revision of the split, class
Planned = Mapping[int, Mapping[str, float]]  # revision -> arm -> probability


@dataclass(frozen=True)
class SampleRatio:
    """The counts so far, and the evidence that they differ from the plan. Immutable; see `after`."""

    counts: Mapping[Stratum, Mapping[str, int]] = field(default_factory=dict)
    process: EProcess = field(default_factory=lambda: EProcess.of(len(CONCENTRATIONS)))

    def after(self, seen: Sequence[tuple[Stratum, str]], planned: Planned) -> SampleRatio:
        """The counts and evidence with more units.

        Args:
            seen: stratum and arm of each unit, in order.
        """
        places: dict[Stratum, list[int]] = {}
        for place, (stratum, _) in enumerate(seen):
            places.setdefault(stratum, []).append(place)
        factors = np.zeros((len(seen), len(CONCENTRATIONS)))
        counts = dict(self.counts)
        for stratum, here in places.items():
            arms = [seen[place][1] for place in here]
            factors[here], counts[stratum] = _factors(arms, planned[stratum[0]], counts.get(stratum, {}))
        return SampleRatio(counts, self.process.through(factors))


def _factors(
    arms: Sequence[str], planned: Mapping[str, float], before: Mapping[str, int]
) -> tuple[Floats, Mapping[str, int]]:
    """Log factors of units of one stratum, (N, concentrations), and the counts after them."""
    names = sorted({*planned, *arms})
    which = np.array([names.index(arm) for arm in arms])
    share = np.array([planned.get(name, 0.0) for name in names])[which]
    one = (which[:, None] == np.arange(len(names))).astype(np.float64)  # (N, arms)
    start = np.array([before.get(name, 0) for name in names], dtype=np.float64)
    seen = np.cumsum(one, axis=0) - one + start  # before each unit
    mine, total, pi = seen[np.arange(len(arms)), which][:, None], seen.sum(axis=1)[:, None], share[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.log((CONCENTRATIONS * pi + mine) / ((CONCENTRATIONS + total) * pi))
    after = start + one.sum(axis=0)
    return np.where(pi > 0, factors, CERTAIN), {name: int(n) for name, n in zip(names, after, strict=True) if n}


# --- validity ---------------------------------------------------------------------------------------------------------


LEVEL = 0.001  # the rate of false alarms
CHECKS = ("units", "outcomes", "delays")
NEEDED = len(CHECKS) / LEVEL  # e-value of an alarm
WIDER = 4.0  # ratio of the widths of two classes of delays
ALL, WITH, MISSING = 0, 0, 1  # classes of units


@dataclass
class Validity:
    """The counts so far; `read` adds to them."""

    units: SampleRatio = field(default_factory=SampleRatio)
    outcomes: SampleRatio = field(default_factory=SampleRatio)  # `_settled`, and units missing since the last outcome
    delays: SampleRatio = field(default_factory=SampleRatio)
    last_unit: int = 0
    last_missing: int = 0
    _settled: SampleRatio = field(default_factory=SampleRatio)  # `outcomes` up to the last outcome
    _latest: float = -math.inf  # time of the latest outcome

    def read(
        self,
        connection: Connection,
        experiment: Experiment,
        planned: Planned,
        counted: Sequence[CountedOutcome],
        now: str,
    ) -> None:
        """Add new units, new outcomes, and units whose outcome is now missing.

        The order of units in `outcomes` depends on the rows of the store alone, not on the times of the looks: a unit
        is missing right before the first outcome that came after the end of its time to live. Units that are missing
        since the last outcome are counted too, but each look counts them anew.

        Args:
            counted: the new outcomes.
            now: the time, as the store has it.
        """
        new = outcomes.units(connection, experiment, self.last_unit)
        self.units = self.units.after([((row.revision, ALL), row.arm) for row in new], planned)
        self.last_unit = new[-1].id if new else self.last_unit
        until = _end(experiment, max([now, *(row.at for row in counted)]))
        missing, last = outcomes.units_without_outcome(connection, experiment, self.last_missing, until)
        settled, open_ = self._in_order(counted, missing, experiment.outcome_ttl or 0.0)
        self.last_missing = open_[0].id - 1 if open_ else last
        self._settled = self._settled.after(settled, planned)
        self.outcomes = self._settled.after([((row.revision, MISSING), row.arm) for row in open_], planned)
        self.delays = self.delays.after(
            [((row.revision, _class(seconds_between(row.first, row.at))), row.arm) for row in counted], planned
        )

    def _in_order(
        self, counted: Sequence[CountedOutcome], missing: Sequence[FirstAnswer], ttl: float
    ) -> tuple[list[tuple[Stratum, str]], Sequence[FirstAnswer]]:
        """New outcomes, with the missing units in between, and the units missing since the last outcome."""
        ordered: list[tuple[Stratum, str]] = []
        place = 0
        for row in counted:
            self._latest = max(self._latest, _seconds(row.at))
            while place < len(missing) and _seconds(missing[place].at) + ttl < self._latest:
                ordered.append(((missing[place].revision, MISSING), missing[place].arm))
                place += 1
            ordered.append(((row.revision, WITH), row.arm))
        return ordered, missing[place:]

    def peaks(self) -> Mapping[str, float]:
        """Check -> its log evidence at the peak."""
        return {check: getattr(self, check).process.peak for check in CHECKS}

    @property
    def alarm(self) -> str | None:
        """The check with the strongest alarm; None without an alarm.

        Two checks may raise one for the same cause, because late outcomes are missing at first.
        """
        check, peak = max(self.peaks().items(), key=lambda each: each[1])
        return check if peak >= math.log(NEEDED) else None

    def missing(self) -> Mapping[str, int]:
        """Arm -> number of units with a missing outcome."""
        chosen = (Counter(seen) for (_, kind), seen in self.outcomes.counts.items() if kind == MISSING)
        return sum(chosen, Counter[str]())

    def half_within(self) -> Mapping[str, float]:
        """Arm -> seconds within which half of its outcomes come, up to the width of the classes."""
        found: dict[str, Counter[int]] = {}
        for (_, kind), counts in self.delays.counts.items():
            for arm, count in counts.items():
                found.setdefault(arm, Counter())[kind] += count
        return {arm: WIDER ** (_median(kinds) + 1) for arm, kinds in found.items()}


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def _end(experiment: Experiment, now: str) -> str | None:
    """Units first answered before this time have a missing outcome now; None if outcomes always count."""
    if experiment.outcome_ttl is None:
        return None
    return timestamp(_seconds(min(now, experiment.ended or now)) - experiment.outcome_ttl)


def _class(waited: float) -> int:
    return int(math.log(max(waited, 1.0), WIDER))


def _median(kinds: Counter[int]) -> int:
    order = sorted(kinds)
    half = kinds.total() / 2
    return next(
        kind for kind, seen in zip(order, accumulate(kinds[kind] for kind in order), strict=True) if seen >= half
    )
