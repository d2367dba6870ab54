"""From evidence to a decision: pure functions that read no clock, no store and no numbers but those they are given.

The order is the policy:

1. errors or latency of a candidate or a shadow beyond its bound: that arm goes, whatever the outcomes say
2. units that did not fall as planned (sample-ratio mismatch): no verdict on outcomes, until a person has looked
3. a candidate that is worse than the control by more than the margin: it goes
4. a candidate that is better than the control: it is promoted where that was asked for, else named
5. otherwise: go on

Of a candidate whose true effect is none, a verdict `better` or `worse` comes in at most a share `level` of experiments,
`level` being alpha over the number of candidates; each bound on errors or latency, and a margin above 0, has a level
of its own, of the same size. Every limit below is one for the evidence's logarithm at its peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from turret.experiments.experiment import Guards, Role

Verdict = Literal["better", "worse", "undecided", "mismatch"]
Action = Literal["continue", "hold", "drop", "promote"]


@dataclass(frozen=True)
class Compared:
    """What is known of one candidate against the control; evidence as logarithms."""

    arm: str
    level: float
    better: float  # peaks
    worse: float
    worse_by: float  # worse by more than the guard's margin


@dataclass(frozen=True)
class Health:
    """How an arm answers; evidence as logarithms, -inf where there is no bound."""

    arm: str
    role: Role
    level: float
    errors: float
    slow: float
    said_errors: str = ""  # "12 of 80 answers were errors, at most 2% may be"
    said_slow: str = ""


@dataclass(frozen=True)
class Decision:
    """What is to be done, and why, for one line."""

    action: Action
    arm: str | None
    why: str


def verdict(found: Compared, *, mismatch: bool) -> Verdict:
    """What may be said of a candidate."""
    if mismatch:
        return "mismatch"
    both = math.log(2 / found.level)
    reached = [peak >= both for peak in (found.better, found.worse)]
    if not any(reached):
        return "undecided"
    return "better" if found.better >= found.worse else "worse"


def decide(compared: Sequence[Compared], health: Sequence[Health], guards: Guards, *, mismatch: bool) -> Decision:
    """The first thing to be done; asked again after it was done."""
    for each in health:
        for evidence, said in ((each.errors, each.said_errors), (each.slow, each.said_slow)):
            if evidence >= math.log(1 / each.level):
                return Decision("drop", each.arm, said)
    if mismatch:
        return Decision("hold", None, "the units did not fall as planned: no verdict before that is explained")
    if guards.worse_by is not None:
        for found in compared:
            if found.worse_by >= math.log(2 / found.level):
                return Decision("drop", found.arm, f"its outcomes are worse{_margin(guards)}")
    if guards.promote:
        winners = [found for found in compared if verdict(found, mismatch=False) == "better"]
        if winners:
            best = max(winners, key=lambda found: found.better)
            return Decision("promote", best.arm, "its outcomes are better")
    return Decision("continue", None, "the evidence decides nothing yet")


def _margin(guards: Guards) -> str:
    return f" by more than {guards.worse_by:g}" if guards.worse_by else ""
