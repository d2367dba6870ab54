"""The settings and the state of an experiment.

- arms: `control` first, then `candidate` (and `candidate2`, ...), then `shadow` arms, whose answers are never returned
- metric: `binary` (0 or 1), or a real number within bounds such as `1..5`; more is better unless `goal` is lower
- unit: what is assigned to an arm and counts once: a user, a session, or a request
- alpha: the level; at most this share of experiments claims a false difference, however often they are looked at
- missing_bound: the share of an arm's units whose outcomes may be missing because of what they are; a verdict must hold
  despite that
- guards: when a candidate is rolled back or promoted automatically
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from typing import Literal, SupportsFloat, get_args

from turret.errors import BadExperiment
from turret.json_types import JsonMapping, JsonObject, Plain

Role = Literal["control", "candidate", "shadow"]
Goal = Literal["higher", "lower"]
CONTROL = "control"
UNITS = ("user", "session", "request")
MOST_ARMS = 10
SLOW_SHARE = 0.05  # of the answers may be slower than `max_seconds`, which bounds their 95th percentile
OUTCOME_TTL = 7 * 86400.0  # seconds
MISSING_BOUND = 0.05  # share of the units of an arm
MOST_MISSING = 0.2
LONGEST_TTL = 3650 * 86400.0
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
INTERNAL = ("id", "salt", "arms", "revision", "segments", "weights")  # fields that have no key in JSON
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)", re.ASCII)
_BOUNDS = re.compile(r" *(-?[0-9.eE+-]+) *\.\. *(-?[0-9.eE+-]+) *", re.ASCII)


@dataclass(frozen=True)
class Metric:
    """The values of an outcome, and whether more or less is better."""

    kind: Literal["binary", "real"] = "binary"
    low: float = 0.0
    high: float = 1.0
    goal: Goal = "higher"

    @classmethod
    def parse(cls, text: str, goal: str = "higher") -> Metric:
        """Parse `binary`, or bounds such as `1..5`; raises BadExperiment."""
        direction: Goal | None = next((each for each in get_args(Goal) if each == goal), None)
        if direction is None:
            raise BadExperiment(f"goal {ascii(goal)[:40]}: expected higher or lower")
        if text.strip() == "binary":
            return cls(goal=direction)
        found = _BOUNDS.fullmatch(text)
        try:
            low, high = (float(found[1]), float(found[2])) if found else (math.nan, math.nan)
        except ValueError:
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise BadExperiment(
                f"bad metric {ascii(text)[:60]}: expected binary, or the least and the greatest outcome, such as 1..5"
            )
        return cls("real", low, high, direction)

    def read(self, value: Plain) -> float | str:
        """The outcome as a number, or the reason why it is not one."""
        if isinstance(value, str):
            value = {"true": True, "false": False, "yes": True, "no": False}.get(value.strip().lower(), value)
        try:
            number = float(value) if isinstance(value, str | SupportsFloat) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if self.kind == "binary" and number not in (0.0, 1.0):
            return f"outcome {ascii(value)[:40]} is not binary: expected 0 or 1"
        if not self.low <= number <= self.high:
            return f"outcome {ascii(value)[:40]} is out of range: expected a number from {self.low:g} to {self.high:g}"
        return number

    def __str__(self) -> str:
        return "binary" if self.kind == "binary" else f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Guards:
    """Conditions that automatically roll back or promote a candidate."""

    worse_by: float | None = 0.0  # margin in the metric's units; None: worse outcomes roll nothing back
    max_errors: float | None = None  # allowed share of a candidate's answers that are errors
    max_seconds: float | None = None  # that 95% of its answers must not exceed
    promote: bool = False  # a better candidate gets the alias automatically

    def check(self, metric: Metric) -> Guards:
        """Return the guards if they suit the metric; raises BadExperiment."""
        wide = metric.high - metric.low
        if self.worse_by is not None and not 0 <= self.worse_by < wide:
            raise BadExperiment(
                f"a margin of {self.worse_by!r}: expected at least 0 and less than {wide:g}, the metric's range"
            )
        if self.max_errors is not None and not 0 < self.max_errors < 1:
            raise BadExperiment(
                f"a bound on errors of {self.max_errors!r}: expected a share between 0 and 1, such as 0.02"
            )
        if self.max_seconds is not None and not (math.isfinite(self.max_seconds) and self.max_seconds > 0):
            raise BadExperiment(f"a bound on latency of {self.max_seconds!r}: expected seconds, such as 2.5")
        return self


@dataclass(frozen=True)
class Arm:
    """A version that gets traffic, or a shadow."""

    name: str
    role: Role
    version: int
    digest: str
    live: bool = True  # False: rolled back while the experiment continued


@dataclass(frozen=True)
class Experiment:
    """An experiment with its arms and its current split."""

    id: int
    adapter: str
    number: int
    state: Literal["running", "ended"]
    alias: str
    salt: str
    metric: Metric
    unit: str
    alpha: float
    guards: Guards
    steps: tuple[float, ...]  # planned shares of the candidates
    outcome_ttl: float | None  # seconds after the first answer to a unit; None: outcomes always count
    missing_bound: float
    arms: tuple[Arm, ...]
    revision: int  # of the split
    segments: tuple[tuple[int, str], ...]  # see `assign`
    weights: Mapping[str, float]  # share of the points of each arm
    created: str
    who: str | None
    ended: str | None = None
    verdict: JsonMapping | None = None

    def __str__(self) -> str:
        return f"{self.adapter}#{self.number}"

    @property
    def control(self) -> Arm:
        return self.arms[0]

    @property
    def candidates(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.role == "candidate")

    @property
    def shadows(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.role == "shadow" and arm.live)

    def arm(self, name: str) -> Arm:
        """The arm with this name or reference; raises BadExperiment, which lists the arms."""
        for arm in self.arms:
            if name in (arm.name, self.reference(arm)):
                return arm
        known = ", ".join(f"{arm.name} ({self.reference(arm)})" for arm in self.arms)
        raise BadExperiment(f"no arm {ascii(name)[:60]} in {self}: it has {known}")

    def reference(self, arm: Arm) -> str:
        return f"{self.adapter}@{arm.version}"

    @property
    def level(self) -> float:
        """The level of one candidate; candidates share alpha."""
        return self.alpha / max(len(self.candidates), 1)

    def next_share(self) -> float | None:
        """The next planned share of the candidates; None if there is none."""
        if not any(arm.live for arm in self.candidates):
            return None
        now = sum(self.weights.get(arm.name, 0.0) for arm in self.candidates)
        return next((share for share in self.steps if share > now + 1e-9), None)

    def as_json(self) -> JsonObject:
        own = {name: value for name, value in asdict(self).items() if name not in INTERNAL}
        return {"experiment": str(self), **own, "steps": list(self.steps)}


def check_unit(unit: str) -> str:
    if unit not in UNITS:
        raise BadExperiment(f"unit {ascii(unit)[:40]}: expected one of {', '.join(UNITS)}")
    return unit


def check_alpha(alpha: float) -> float:
    if not 0 < alpha <= 0.5:
        raise BadExperiment(f"level {alpha!r}: expected above 0 and at most 0.5, such as 0.05")
    return alpha


def check_steps(steps: Sequence[float]) -> tuple[float, ...]:
    """The shares of a planned ramp, which must rise; raises BadExperiment."""
    ramp = tuple(float(share) for share in steps)
    rising = all(a < b for a, b in pairwise(ramp))
    if not ramp or not rising or not all(0 < share <= 1 for share in ramp):
        raise BadExperiment(
            f"a ramp of {', '.join(f'{share:g}' for share in ramp) or 'nothing'}: expected rising shares above 0 and "
            "at most 1, such as 0.05, 0.2, 0.5"
        )
    return ramp


def check_ttl(seconds: float) -> float:
    """The time to live of outcomes in seconds; raises BadExperiment."""
    if not 1 <= seconds <= LONGEST_TTL:
        raise BadExperiment(f"outcome_ttl of {seconds!r} s: expected 1 second to 10 years, such as 7d")
    return float(seconds)


def check_missing(share: float) -> float:
    """The bound on outcomes that are not missing at random; raises BadExperiment."""
    if not 0 <= share <= MOST_MISSING:
        raise BadExperiment(
            f"missing_bound of {share!r}: expected a share of an arm's units from 0 to {MOST_MISSING:g}, such as 5%; "
            "0 claims that outcomes are missing at random"
        )
    return float(share)


def read_duration(text: str, what: str = "duration") -> float:
    """Parse `90`, `90s`, `15m`, `1.5h`, `1h30m` or `7d` to seconds; raises BadExperiment. what: for its message."""
    given = "".join(text.lower().split())
    parts = _DURATION.findall(given)
    if not parts or "".join(number + unit for number, unit in parts) != given:
        raise BadExperiment(f"{what} {ascii(text)[:40]}: expected a number with s, m, h or d, such as 30m or 7d")
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


def duration_text(seconds: float) -> str:
    """Format a duration for people: `7 days`, `1.5 hours`, `3,650 days`."""
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = f"{seconds / size:.3g}" if seconds < 999.5 * size else f"{seconds / size:,.0f}"
            return f"{count} {name}{'' if count == '1' else 's'}"
    return f"{seconds:.3g} s"


def seconds_between(first: str, then: str) -> float:
    """Seconds from one stored time to another."""
    return (datetime.fromisoformat(then) - datetime.fromisoformat(first)).total_seconds()


def read_share(text: str) -> float:
    """Parse `20%` or `0.2`; raises BadExperiment."""
    stripped = text.strip()
    try:
        share = float(stripped.removesuffix("%")) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise BadExperiment(f"share {ascii(text)[:40]}: expected a share of the traffic, such as 20% or 0.2")
    return share


def read_split(text: str) -> float | dict[str, float]:
    """Parse `20%` for all candidates together, or `candidate=20%,candidate2=10%`; raises BadExperiment."""
    if "=" not in text:
        return read_share(text)
    found: dict[str, float] = {}
    for part in text.split(","):
        arm, _, share = part.partition("=")
        found[arm.strip()] = read_share(share)
    return found


def named_arms(
    control: tuple[int, str], candidates: Sequence[tuple[int, str]], shadows: Sequence[tuple[int, str]]
) -> tuple[Arm, ...]:
    """The arms for these versions (number and digest); raises BadExperiment if two are the same version."""
    if not candidates and not shadows:
        raise BadExperiment("an experiment needs two versions: give at least one candidate or shadow")
    if len(candidates) + len(shadows) >= MOST_ARMS:
        raise BadExperiment(f"{1 + len(candidates) + len(shadows)} arms: at most {MOST_ARMS} run at once")
    arms = [Arm(CONTROL, "control", *control)]
    groups: tuple[tuple[Role, Sequence[tuple[int, str]]], ...] = (("candidate", candidates), ("shadow", shadows))
    for role, versions in groups:
        for place, version in enumerate(versions, start=1):
            name = role if place == 1 else f"{role}{place}"
            arms.append(Arm(name, role, *version))
    for place, arm in enumerate(arms):
        for other in arms[:place]:
            if other.digest == arm.digest:
                raise BadExperiment(
                    f"{other.name} and {arm.name} are the same version (number {arm.version}): give two that differ"
                )
    return tuple(arms)


def shares(arms: Sequence[Arm], split: float | Mapping[str, float]) -> dict[str, float]:
    """The weights of control and live candidates, which add up to 1.

    Args:
        split: the share of all candidates together, divided equally, or a share for each. The control gets the rest.

    Raises:
        BadExperiment: an unknown arm, or shares that are negative or add up to more than 1.
    """
    live = [arm.name for arm in arms if arm.role == "candidate" and arm.live]
    if isinstance(split, Mapping):
        given = {name: float(share) for name, share in split.items() if name != CONTROL}
        if unknown := [name for name in given if name not in live]:
            raise BadExperiment(f"no live candidate {ascii(unknown[0])[:40]}: there are {', '.join(live) or 'none'}")
        given = {name: given.get(name, 0.0) for name in live}
    else:
        given = {name: float(split) / len(live) for name in live}
    total = sum(given.values())
    if not all(math.isfinite(share) and share >= 0 for share in given.values()) or not 0 <= total <= 1 + 1e-9:
        raise BadExperiment(
            f"shares {', '.join(f'{name}={share:g}' for name, share in given.items())}: expected shares from 0 "
            "that add up to at most 1; the control gets the rest"
        )
    return {CONTROL: max(1.0 - total, 0.0), **given}
