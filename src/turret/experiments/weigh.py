"""An experiment weighed: its rows become evidence, the evidence a decision. Refuses to know what is done about it.

`Memory` keeps what was added up of the outcomes read so far, so that looking again costs only what is new.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, func, select

from turret.database import assignments
from turret.experiments import bounds, decide, health, outcomes, ratio, rows
from turret.experiments.decide import Compared, Decision, Health, Verdict
from turret.experiments.evidence import Tally
from turret.experiments.experiment import SLOW_SHARE, Arm, Experiment
from turret.experiments.health import Answering

AT_ONCE = 50_000  # outcomes that are added up in one piece


@dataclass
class Memory:
    """What was added up of one experiment's counted outcomes. The numbers are pure; this only remembers where it is."""

    last: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)  # of each candidate
    counts: dict[int, dict[str, int]] = field(default_factory=dict)  # revision -> arm -> outcomes
    sums: dict[str, float] = field(default_factory=dict)  # arm -> outcomes, added up

    def read(self, connection: Connection, experiment: Experiment, split: Mapping[int, Mapping[str, float]]) -> None:
        """Add the outcomes that are new."""
        found = outcomes.counted(connection, experiment, self.last)
        for start in range(0, len(found), AT_ONCE):
            self.add(experiment, split, found[start : start + AT_ONCE])

    def add(self, experiment: Experiment, split: Mapping[int, Mapping[str, float]], found: Any) -> None:
        """Add these outcomes (`outcomes.counted`), at least one."""
        metric, guards = experiment.metric, experiment.guards
        wide = metric.high - metric.low
        values = np.array([row.value for row in found])
        y = (values - metric.low) / wide
        if metric.goal == "lower":
            y = 1 - y
        for arm in experiment.candidates:
            here = np.array([row.arm in (arm.name, experiment.control.name) for row in found])
            shares = [_share(split[row.revision], arm.name, experiment.control.name) for row in found]
            which = np.array([int(row.arm == arm.name) for row in found])
            margin = None if guards.worse_by is None else guards.worse_by / wide
            tally = self.tallies.get(arm.name) or Tally.empty(binary=metric.kind == "binary", margin=margin)
            self.tallies[arm.name] = tally.after(which[here], y[here], np.array(shares)[here])
        for row in found:
            counts = self.counts.setdefault(row.revision, {})
            counts[row.arm] = counts.get(row.arm, 0) + 1
            self.sums[row.arm] = self.sums.get(row.arm, 0.0) + row.value
        self.last = found[-1].id


@dataclass(frozen=True)
class Against:
    """A candidate against the control; evidence as e-values of which 1 / level decides, each side halved."""

    verdict: Verdict
    difference: float | None  # in the metric's units
    interval: tuple[float, float] | None  # approximate
    better: float  # peak / 2
    worse: float
    worse_by: float | None  # peak / 2; None where the guard is off
    equality: float  # logarithm, as it is now
    needed: float  # 1 / level

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "difference": self.difference,
            "interval": None if self.interval is None else list(self.interval),
            "evidence": {"better": self.better, "worse": self.worse, "worse_by": self.worse_by, "needed": self.needed},
        }


@dataclass(frozen=True)
class ArmWeighed:
    """One arm, with all that is known of it."""

    arm: Arm
    version: str
    share: float
    units: int
    outcomes: int
    mean: float | None
    answering: Answering
    against: Against | None  # of a candidate

    def as_json(self) -> dict[str, Any]:
        seen = self.answering
        return {
            "arm": self.arm.name,
            "role": self.arm.role,
            "version": self.version,
            "digest": self.arm.digest,
            "live": self.arm.live,
            "share": self.share,
            "units": self.units,
            "outcomes": self.outcomes,
            "mean": self.mean,
            "answers": seen.answers,
            "errors": seen.errors,
            "slow": seen.slow,
            "mean_seconds": seen.seconds / seen.answers if seen.answers else None,
            "compared": seen.compared,
            "agreed": seen.agreed,
            "against_control": None if self.against is None else self.against.as_json(),
        }


@dataclass(frozen=True)
class Weighed:
    """All that is known of an experiment, and what it says to do."""

    experiment: Experiment
    arms: tuple[ArmWeighed, ...]
    ratio_units: float  # e-values against `the units fell as planned`
    ratio_outcomes: float
    decision: Decision
    history: tuple[Mapping[str, Any], ...]

    @property
    def mismatch(self) -> bool:
        return max(self.ratio_units, self.ratio_outcomes) >= RATIO_NEEDED

    @property
    def equality(self) -> float:
        """The logarithm of the evidence that some candidate differs, as it is now: a mean of e-values is one."""
        logs = [each.against.equality for each in self.arms if each.against is not None]
        return float(np.logaddexp.reduce(logs)) - math.log(len(logs)) if logs else 0.0


RATIO_NEEDED = 2 / ratio.LEVEL  # two checks share the level


def weigh(connection: Connection, experiment: Experiment, memory: Memory | None = None) -> Weighed:
    """Read what is new and weigh all of it."""
    memory = memory if memory is not None else Memory()
    split = rows.probabilities(connection, experiment)
    memory.read(connection, experiment, split)
    units = _units(connection, experiment)
    ratios = tuple(_capped(ratio.evidence(_splits(split, counts))) for counts in (units, memory.counts))
    mismatch = max(ratios) >= RATIO_NEEDED
    answering = health.of(connection, experiment)
    compared = [_compared(experiment, arm, memory) for arm in experiment.candidates]
    arms = tuple(
        ArmWeighed(
            arm,
            experiment.reference(arm),
            experiment.weights.get(arm.name, 0.0),
            sum(counts.get(arm.name, 0) for counts in units.values()),
            count := sum(counts.get(arm.name, 0) for counts in memory.counts.values()),
            memory.sums[arm.name] / count if count else None,
            answering.get(arm.name, Answering()),
            against(experiment, arm, memory, mismatch) if arm.role == "candidate" else None,
        )
        for arm in experiment.arms
    )
    live = [each for each in compared if experiment.arm(each.arm).live]
    guarded = [_health(experiment, each.arm, each.answering) for each in arms[1:] if each.arm.live]
    decision = decide.decide(live, guarded, experiment.guards, mismatch=mismatch)
    history = tuple(rows.events(connection, experiment))
    return Weighed(experiment, arms, ratios[0], ratios[1], decision, history)


def _share(split: Mapping[str, float], candidate: str, control: str) -> float:
    """The probability of the candidate, of the two."""
    both = split.get(candidate, 0.0) + split.get(control, 0.0)
    return split.get(candidate, 0.0) / both if both > 0 else 0.0


def _units(connection: Connection, experiment: Experiment) -> dict[int, dict[str, int]]:
    """Revision -> arm -> units that were sent there when they were first seen."""
    table = assignments.c
    query = (
        select(table.revision, table.arm, func.count().label("units"))
        .where((table.experiment_id == experiment.id) & (table.first == 1))
        .group_by(table.revision, table.arm)
    )
    found: dict[int, dict[str, int]] = {}
    row: Row[Any]
    for row in connection.execute(query):
        found.setdefault(row.revision, {})[row.arm] = row.units
    return found


def _splits(split: Mapping[int, Mapping[str, float]], counts: Mapping[int, Mapping[str, int]]) -> list[ratio.Split]:
    return [(split[revision], seen) for revision, seen in sorted(counts.items())]


def _compared(experiment: Experiment, arm: Arm, memory: Memory) -> Compared:
    tally = memory.tallies.get(arm.name)
    if tally is None:
        return Compared(arm.name, experiment.level, 0.0, 0.0, 0.0)
    return Compared(arm.name, experiment.level, tally.better.peak, tally.worse.peak, tally.worse_by.peak)


def against(experiment: Experiment, arm: Arm, memory: Memory, mismatch: bool) -> Against:
    """The candidate against the control, by what the memory has."""
    found, tally = _compared(experiment, arm, memory), memory.tallies.get(arm.name)
    metric, level = experiment.metric, experiment.level
    scale = (metric.high - metric.low) * (1 if metric.goal == "higher" else -1)
    interval = None if tally is None else tally.interval(level)
    difference = None if tally is None else tally.difference
    ends = sorted(end * scale for end in interval) if interval is not None else None
    return Against(
        verdict=decide.verdict(found, mismatch=mismatch),
        difference=None if difference is None else difference * scale,
        interval=None if ends is None else (ends[0], ends[1]),
        better=_capped(found.better) / 2,
        worse=_capped(found.worse) / 2,
        worse_by=None if experiment.guards.worse_by is None else _capped(found.worse_by) / 2,
        equality=0.0 if tally is None else tally.equality(),
        needed=1 / level,
    )


def _health(experiment: Experiment, arm: Arm, seen: Answering) -> Health:
    guards = experiment.guards
    errors = slow = -math.inf
    said_errors = said_slow = ""
    if guards.max_errors is not None:
        errors = bounds.evidence(seen.errors, seen.answers, guards.max_errors)
        said_errors = (
            f"{seen.errors} of {seen.answers} answers were errors, at most {guards.max_errors:.3g} of them may be"
        )
    if guards.max_seconds is not None:
        slow = bounds.evidence(seen.slow, seen.answers, SLOW_SHARE)
        took = f"{seen.slow} of {seen.answers} answers took longer than {guards.max_seconds:g} s"
        said_slow = f"{took}, at most {SLOW_SHARE:.0%} of them may"
    return Health(arm.name, arm.role, experiment.alpha, errors, slow, said_errors, said_slow)


def _capped(log: float) -> float:
    """An e-value that JSON can say."""
    return math.exp(min(log, 690.0))
