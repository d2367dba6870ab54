"""Can the arms be compared at all? Units, outcomes that are missing, and outcomes that come late, arm against arm.

Where the arm has no effect on who comes, on whether an outcome is told and on how long that takes, each of these
classes of units falls on the arms as the traffic was planned (`ratio`):

- units: all units, when they are first seen
- outcomes (completeness): units with an outcome, and units that had none within the time to live of outcomes
- delays: units with an outcome, by its delay, in classes four times as long as the one before

An alarm is for good: the evidence is looked at by its peak. Three checks share one level.

What none of them can see: outcomes of another mix in one arm, as many and as quick as in the other. An arm whose bad
outcomes are replaced by nothing but good ones of other units looks better, and no count tells.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from typing import Any

from sqlalchemy import Connection

from turret.experiments import outcomes
from turret.experiments.experiment import Experiment, seconds_between
from turret.experiments.sample_ratio import Planned, SampleRatio

LEVEL = 0.001  # how rarely comparable arms may be called incomparable
CHECKS = ("units", "outcomes", "delays")
NEEDED = len(CHECKS) / LEVEL  # the e-value that raises an alarm
WIDER = 4.0  # times as long as the class of delays before
ALL, WITH, MISSING = 0, 0, 1  # classes of units


@dataclass
class Validity:
    """What was counted so far; `read` goes on where it was."""

    units: SampleRatio = field(default_factory=SampleRatio)
    outcomes: SampleRatio = field(default_factory=SampleRatio)
    delays: SampleRatio = field(default_factory=SampleRatio)
    last_unit: int = 0
    last_missing: int = 0

    def read(
        self, connection: Connection, experiment: Experiment, planned: Planned, told: Sequence[Any], now: str
    ) -> None:
        """Add what is new: units, the outcomes that were `told`, and units that are without one for too long."""
        new = outcomes.units(connection, experiment, self.last_unit)
        self.units = self.units.after([((row.revision, ALL), row.arm) for row in new], planned)
        self.last_unit = new[-1].id if new else self.last_unit
        missing, self.last_missing = outcomes.missing(connection, experiment, self.last_missing, _end(experiment, now))
        ttl = experiment.outcome_ttl or 0.0
        revealed = [(_seconds(row.at), (row.revision, WITH), row.arm) for row in told]
        revealed += [(_seconds(row.at) + ttl, (row.revision, MISSING), row.arm) for row in missing]
        revealed.sort(key=lambda each: each[0])
        self.outcomes = self.outcomes.after([each[1:] for each in revealed], planned)
        self.delays = self.delays.after(
            [((row.revision, _class(seconds_between(row.first, row.at))), row.arm) for row in told], planned
        )

    def peaks(self) -> Mapping[str, float]:
        """The logarithm of the evidence of each check, at its peak."""
        return {check: getattr(self, check).process.peak for check in CHECKS}

    @property
    def alarm(self) -> str | None:
        """The check that says most clearly that the arms cannot be compared; None where none does.

        Outcomes that are late are missing at first, so that both checks may say so.
        """
        check, peak = max(self.peaks().items(), key=lambda each: each[1])
        return check if peak >= math.log(NEEDED) else None

    def missing(self) -> Mapping[str, int]:
        """Arm -> units that are missing an outcome."""
        chosen = (Counter(seen) for (_, kind), seen in self.outcomes.counts.items() if kind == MISSING)
        return sum(chosen, Counter[str]())

    def half_within(self) -> Mapping[str, float]:
        """Arm -> seconds within which half of its outcomes come, as finely as the classes are."""
        found: dict[str, Counter[int]] = {}
        for (_, kind), counts in self.delays.counts.items():
            for arm, count in counts.items():
                found.setdefault(arm, Counter())[kind] += count
        return {arm: WIDER ** (_median(kinds) + 1) for arm, kinds in found.items()}


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def _end(experiment: Experiment, now: str) -> str | None:
    """When a unit must have been seen first, that an outcome is missing now; None: outcomes live for ever."""
    if experiment.outcome_ttl is None:
        return None
    until = min(now, experiment.ended or now)
    moment = datetime.fromtimestamp(_seconds(until) - experiment.outcome_ttl, tz=datetime.fromisoformat(until).tzinfo)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _class(waited: float) -> int:
    return int(math.log(max(waited, 1.0), WIDER))


def _median(kinds: Counter[int]) -> int:
    order = sorted(kinds)
    half = kinds.total() / 2
    return next(
        kind for kind, seen in zip(order, accumulate(kinds[kind] for kind in order), strict=True) if seen >= half
    )
