"""Analyze an experiment: turn its rows into evidence, and the evidence into a decision.

`Memory` keeps the sums over the outcomes that were read, so that another analysis reads only new rows.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
from sqlalchemy import Connection

from turret.experiments import evidence, outcomes, rows
from turret.experiments.evidence import HIDDEN, OutcomeTally
from turret.experiments.experiment import SLOW_SHARE, Arm, Experiment, Guards
from turret.experiments.guarding import Detector, Watch
from turret.experiments.outcomes import CountedOutcome
from turret.experiments.rows import ArmHealth, Event
from turret.experiments.validity import Validity
from turret.json_types import AsJson, JsonMapping, JsonObject
from turret.statistics import capped_e_value, log_mean

# --- decide -----------------------------------------------------------------------------------------------------------
# The policy from evidence to a decision, as pure functions.
#
# The first rule that applies decides:
#
# 1. errors or latency of a candidate or shadow exceed their bound and those of the control: drop the arm, whatever its
#    outcomes
# 2. the arms cannot be compared (`turret.experiments.validity`): the outcomes are void permanently, and there is no
#    verdict
# 3. a candidate is worse than the control by more than the margin: drop it
# 4. a candidate is better than the control: promote it, if the guards say so and it is a discovery among all
#    experiments of the store (`turret.experiments.evidence`)
# 5. otherwise: continue
#
# If a candidate has no true effect, it gets a verdict `better` or `worse` in at most a share `level` of experiments.
# `level` is alpha divided by the number of candidates. A margin above 0 has its own level of the same size. Bounds on
# errors and latency have a rate of false alarms instead, because they watch for as long as the experiment runs
# (`turret.experiments.guarding`).


Verdict = Literal["better", "worse", "undecided", "void"]
Action = Literal["continue", "hold", "drop", "promote"]


@dataclass(frozen=True)
class Decision:
    """What to do, and why, on one line."""

    action: Action
    arm: str | None
    why: str


def deciding_evidence(level: float) -> float:
    """The log evidence that decides. Two sides, or two ways to exceed a bound, share the level."""
    return math.log(2 / level)


def decide(
    live: Mapping[str, Against],
    alarms: Sequence[tuple[str, str]],
    guards: Guards,
    *,
    void: str | None,
    named: bool = True,
) -> Decision:
    """The first thing to do. Call it again after it was done.

    Args:
        live: candidate -> its evidence; those that were rolled back are left out.
        alarms: (arm, such as "12 of its last 80 answers were errors, the limit is 2%; ...").
        void: the check that found that the arms cannot be compared, or None.
        named: whether the experiment is a discovery among all experiments of the store.
    """
    for arm, alarm in alarms:
        return Decision("drop", arm, alarm)
    if void is not None:
        return Decision("hold", None, void)
    for arm, found in live.items():
        if found.worse_by is not None and found.worse_by >= found.needed:
            return Decision("drop", arm, f"its outcomes are worse{_margin(guards)}")
    if guards.promote:
        winners = {arm: found.peak for arm, found in live.items() if found.wins}
        if winners and named:
            return Decision("promote", max(winners, key=lambda arm: winners[arm]), "its outcomes are better")
    return Decision("continue", None, "the evidence is not decisive yet")


def _margin(guards: Guards) -> str:
    return f" by more than {guards.worse_by:g}" if guards.worse_by else ""


# --- analyze ----------------------------------------------------------------------------------------------------------


VOID = "void"  # the verb of the event of an alarm
AT_ONCE = 50_000  # outcomes that are added at once, to bound memory


@dataclass
class Memory:
    """Sums over the rows of one experiment that were read so far."""

    last: int = 0  # id of the last outcome
    tallies: dict[str, OutcomeTally] = field(default_factory=dict)  # candidate -> outcomes
    counts: dict[int, dict[str, int]] = field(default_factory=dict)  # revision -> arm -> outcomes
    sums: dict[str, float] = field(default_factory=dict)  # arm -> sum of outcomes
    first_arms: Counter[str] = field(default_factory=Counter)  # arm of the first answer -> units with an outcome
    validity: Validity = field(default_factory=Validity)
    watch: Watch | None = None  # of errors and latency
    hides: bool = True  # compute what hidden outcomes could do to a verdict

    def read(self, connection: Connection, experiment: Experiment, now: str) -> None:
        """Read and add new rows."""
        split = rows.probabilities(connection, experiment)
        found = outcomes.counted_outcomes(connection, experiment, self.last)
        for start in range(0, len(found), AT_ONCE):
            self.add(experiment, split, found[start : start + AT_ONCE])
        self.validity.read(connection, experiment, split, found, now)
        self.watch = self.watch or Watch(experiment.control.name, _bounds(experiment))
        self.watch.read(rows.health_rows(connection, experiment, self.watch.last), rows.splits(connection, experiment))

    def add(
        self, experiment: Experiment, split: Mapping[int, Mapping[str, float]], found: Sequence[CountedOutcome]
    ) -> None:
        """Add outcomes that count, at least one."""
        metric = experiment.metric
        values = np.array([row.value for row in found])
        y = (values - metric.low) / (metric.high - metric.low)
        if metric.goal == "lower":
            y = 1 - y
        for arm in experiment.candidates:
            here = np.array([row.arm in (arm.name, experiment.control.name) for row in found])
            shares = [_share(split[row.revision], arm.name, experiment.control.name) for row in found]
            which = np.array([int(row.arm == arm.name) for row in found])
            tally = self.tally(experiment, arm)
            self.tallies[arm.name] = tally.after(which[here], y[here], np.array(shares)[here])
        for row in found:
            counts = self.counts.setdefault(row.revision, {})
            counts[row.arm] = counts.get(row.arm, 0) + 1
            self.sums[row.arm] = self.sums.get(row.arm, 0.0) + row.value
            self.first_arms[row.first_arm] += 1
        self.last = found[-1].id

    def tally(self, experiment: Experiment, arm: Arm) -> OutcomeTally:
        """The sums over the outcomes of a candidate and the control; empty without outcomes."""
        metric, margin = experiment.metric, experiment.guards.worse_by
        return self.tallies.get(arm.name) or OutcomeTally.empty(
            binary=metric.kind == "binary",
            margin=None if margin is None else margin / (metric.high - metric.low),
            decides=deciding_evidence(experiment.level),
            hides=self.hides,
        )

    def mean(self, arm: str) -> float | None:
        """The mean outcome of an arm, or None."""
        return self.sums[arm] / _total(self.counts.values())[arm] if arm in self.sums else None


@dataclass(frozen=True)
class Since(AsJson):
    """The outcomes after a verdict."""

    outcomes: int
    difference: float | None  # in the metric's units
    turned: bool  # they have reversed the verdict


@dataclass(frozen=True)
class Missing:
    """What the units without an outcome could change about a verdict."""

    share: float  # of the units of the arm with fewer outcomes
    assumed: float  # share of the units of each arm that may be hidden: the experiment's bound, or what is missing
    tipping: float  # the largest such share despite which the outcomes still decide; 0 if none is

    @property
    def holds(self) -> bool:
        """Whether a verdict stands despite the assumed share."""
        return self.tipping >= self.assumed

    def as_json(self) -> JsonObject:
        return asdict(self) | {"holds": self.holds}


@dataclass(frozen=True)
class Against:
    """A candidate against the control. Evidence is an e-value, halved for the two sides; 1 / level decides.

    `verdict` holds even if the bounded share of outcomes is missing because of what they are. `if_alike` is what the
    outcomes say if the missing ones are like the others; an alarm takes it back.
    """

    verdict: Verdict
    if_alike: Verdict
    missing: Missing
    difference: float | None  # in the metric's units
    interval: tuple[float, float] | None  # a confidence sequence, in the metric's units
    better: float  # peak / 2
    worse: float
    worse_by: float | None  # peak / 2; None if the guard is off
    peak: float  # log evidence of better, neither halved nor capped
    now: float  # current evidence of the side of the verdict, halved
    equality: float  # current log evidence against equal arms
    needed: float  # 1 / level
    since: Since | None  # None without a verdict

    @property
    def turned(self) -> bool:
        return self.since is not None and self.since.turned

    @property
    def wins(self) -> bool:
        """Whether it is better, and later outcomes have not reversed that."""
        return self.verdict == "better" and not self.turned

    def as_json(self) -> JsonObject:
        return {
            "verdict": self.verdict,
            "if_missing_are_alike": "void" if self.verdict == "void" else self.if_alike,
            "missing": self.missing.as_json(),
            "difference": self.difference,
            "interval": None if self.interval is None else list(self.interval),
            "evidence": {"better": self.better, "worse": self.worse, "worse_by": self.worse_by, "needed": self.needed},
            "since_verdict": None if self.since is None else self.since.as_json(),
        }


@dataclass(frozen=True)
class ArmAnalysis:
    """One arm and everything known about it."""

    arm: Arm
    version: str
    share: float
    units: int  # by the arm of the outcome, or of the first answer if there is no outcome
    outcomes: int
    missing: int  # units without an outcome after the time to live
    half_within: float | None  # seconds within which half of its outcomes come
    mean: float | None
    answering: ArmHealth
    against: Against | None  # None for the control and for shadows

    def as_json(self) -> JsonObject:
        seen = self.answering
        return {
            "arm": self.arm.name,
            "role": self.arm.role,
            "digest": self.arm.digest,
            "live": self.arm.live,
            **{name: value for name, value in vars(self).items() if name not in ("arm", "answering", "against")},
            **{name: value for name, value in vars(seen).items() if name != "seconds"},
            "mean_seconds": seen.seconds / seen.answers if seen.answers else None,
            "against_control": None if self.against is None else self.against.as_json(),
        }


@dataclass(frozen=True)
class Analysis:
    """The evidence of an experiment, and the decision that follows."""

    experiment: Experiment
    arms: tuple[ArmAnalysis, ...]
    first_answers: Mapping[str, int]  # arm -> units that it answered first
    checks: Mapping[str, float]  # check of `validity` -> e-value at its peak
    alarm: str | None  # the check that makes the outcomes void
    recorded: JsonMapping | None  # the alarm as it was first stored
    discovery: float | None  # log evidence that makes a better candidate a discovery
    decision: Decision
    history: tuple[Event, ...]

    @property
    def void(self) -> bool:
        return self.alarm is not None

    @property
    def evidence(self) -> float | None:
        """The current log evidence that some candidate differs; None if the outcomes are void."""
        return None if self.void else _equality([each.against for each in self.arms])


def analyze(
    connection: Connection,
    experiment: Experiment,
    now: str,
    memory: Memory | None = None,
    others: Callable[[], Sequence[float]] = tuple,
) -> Analysis:
    """Read new rows and analyze all.

    Args:
        now: the time, as the store has it.
        memory: from the last analysis of this experiment.
        others: returns the log evidence of all other experiments of the store; called only if a candidate is better.
    """
    memory = memory if memory is not None else Memory()
    memory.read(connection, experiment, now)
    history = tuple(rows.events(connection, experiment))
    recorded = next((each["detail"] for each in history if each["verb"] == VOID), None)
    alarm = memory.validity.alarm if recorded is None else str(recorded.get("check"))
    watch = memory.watch
    counted, first = _total(memory.counts.values()), _total(memory.validity.units.counts.values())
    units = counted + (first - memory.first_arms)  # a ramp may move a unit between its first answer and its outcome
    missing, half = memory.validity.missing(), memory.validity.half_within()
    assert watch is not None
    arms = tuple(
        ArmAnalysis(
            arm,
            experiment.reference(arm),
            experiment.weights.get(arm.name, 0.0),
            units[arm.name],
            counted[arm.name],
            missing.get(arm.name, 0),
            half.get(arm.name),
            memory.mean(arm.name),
            watch.sums.get(arm.name, ArmHealth()),
            compare_with_control(experiment, arm, memory, void=alarm is not None, units=units)
            if arm.role == "candidate"
            else None,
        )
        for arm in experiment.arms
    )
    live = {each.arm.name: each.against for each in arms if each.against is not None and each.arm.live}
    alarms = [(each.arm.name, text) for each in arms[1:] if each.arm.live for text in _alarms(experiment, each, watch)]
    won = alarm is None and any(found.wins for found in live.values())
    other_evidence = others() if won and experiment.state == rows.RUNNING else ()
    discovery = evidence.evidence_needed(other_evidence, experiment.alpha) if other_evidence else None
    named = discovery is None or _equality([each.against for each in arms]) >= discovery
    decision = decide(live, alarms, experiment.guards, void=alarm, named=named)
    checks = {check: capped_e_value(peak) for check, peak in memory.validity.peaks().items()}
    return Analysis(experiment, arms, first, checks, alarm, recorded, discovery, decision, history)


def compare_with_control(
    experiment: Experiment, arm: Arm, memory: Memory, *, void: bool, units: Mapping[str, int] | None = None
) -> Against:
    """The candidate against the control, by the sums in the memory.

    Args:
        units: arm -> number of its units; without it all of them have an outcome.
    """
    tally, metric, level = memory.tally(experiment, arm), experiment.metric, experiment.level
    scale = (metric.high - metric.low) * (1 if metric.goal == "higher" else -1)
    interval, difference = tally.interval(level), tally.difference
    ends = None if interval is None else sorted(end * scale for end in interval)
    verdict: Verdict = tally.verdict or "undecided"
    side = tally.worse if verdict == "worse" else tally.better
    missing = _missing(experiment, arm, memory, verdict, units or {})
    stands: Verdict = verdict if missing.holds else "undecided"
    return Against(
        verdict="void" if void else stands,
        if_alike=verdict,
        missing=missing,
        difference=None if difference is None else difference * scale,
        interval=None if ends is None else (ends[0], ends[1]),
        better=capped_e_value(tally.better.peak) / 2,
        worse=capped_e_value(tally.worse.peak) / 2,
        worse_by=None if experiment.guards.worse_by is None else capped_e_value(tally.worse_by.peak) / 2,
        peak=tally.better.peak,
        now=capped_e_value(side.now) / 2,
        equality=tally.equality(missing.assumed),
        needed=1 / level,
        since=_since(tally, scale),
    )


def _missing(experiment: Experiment, arm: Arm, memory: Memory, verdict: Verdict, units: Mapping[str, int]) -> Missing:
    """What missing outcomes could do to this verdict."""
    told = _total(memory.counts.values())
    shares = [1 - told[each] / units[each] for each in (arm.name, experiment.control.name) if units.get(each)]
    share = max(shares, default=0.0)
    may = min(share, experiment.missing_bound)
    assumed = min((beta for beta in HIDDEN if beta >= may - 1e-9), default=HIDDEN[-1]) if may > 0 else 0.0
    tipping = memory.tally(experiment, arm).tipping(verdict) if verdict in ("better", "worse") else 0.0
    return Missing(share, assumed, tipping)


def _since(tally: OutcomeTally, scale: float) -> Since | None:
    after = tally.since
    if after is None:
        return None
    difference = after.difference
    return Since(sum(after.counts), None if difference is None else difference * scale, tally.turned)


def _equality(found: Sequence[Against | None]) -> float:
    logs = [each.equality for each in found if each is not None]
    return float(log_mean(np.array([logs]))[0]) if logs else 0.0


def _total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Sum counts by arm."""
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return total


def _share(split: Mapping[str, float], candidate: str, control: str) -> float:
    """The probability of the candidate, out of these two arms."""
    both = split.get(candidate, 0.0) + split.get(control, 0.0)
    return split.get(candidate, 0.0) / both if both > 0 else 0.0


def _bounds(experiment: Experiment) -> dict[str, float]:
    """Kind of bad answers -> the share that the guards allow."""
    guards = experiment.guards
    errors = {} if guards.max_errors is None else {"errors": guards.max_errors}
    return errors if guards.max_seconds is None else errors | {"slow": SLOW_SHARE}


def _alarms(experiment: Experiment, each: ArmAnalysis, watch: Watch) -> Iterator[str]:
    """What the detectors say about the answers of an arm."""
    watched = watch.arms.get(each.arm.name)
    for found in () if watched is None else watched.detectors:
        if found.alarm:
            yield _alarm(found, experiment.guards.max_seconds)


def _alarm(found: Detector, seconds: float | None) -> str:
    what = "were errors" if found.kind == "errors" else f"took longer than {seconds or 0.0:g} s"
    bad, control = getattr(found.arm, found.kind), found.control
    beside = f"; {getattr(control, found.kind)} of {control.answers} of the control's" if control.answers else ""
    return f"{bad} of its last {found.arm.answers} answers {what}, the limit is {100 * found.bound:.3g}%{beside}"


# --- history ----------------------------------------------------------------------------------------------------------


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
    """How the evidence of one experiment grew, for plots: a point after every so many outcomes.

    With `2 * POINTS` points every second one is dropped, so the number stays bounded. Safe to use from several threads.
    """

    points: list[EvidencePoint] = field(default_factory=list)
    _memory: Memory = field(default_factory=lambda: Memory(hides=False))  # a plot shows no tipping point
    _every: int = 1  # outcomes per point
    _seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, connection: Connection, experiment: Experiment) -> None:
        """Add new outcomes from the store."""
        with self._lock:
            split = rows.probabilities(connection, experiment)
            found = outcomes.counted_outcomes(connection, experiment, self._memory.last)
            while found:
                some, found = found[: self._every], found[self._every :]
                self._memory.add(experiment, split, some)
                self._seen += len(some)
                self.points.append(self._point(experiment, some[-1].at))
                if len(self.points) >= 2 * POINTS:
                    self.points, self._every = self.points[1::2], 2 * self._every

    def _point(self, experiment: Experiment, at: str) -> EvidencePoint:
        means = {arm.name: self._memory.mean(arm.name) for arm in experiment.arms}
        known = {
            arm.name: compare_with_control(experiment, arm, self._memory, void=False) for arm in experiment.candidates
        }
        return EvidencePoint(self._seen, at, means, known)
