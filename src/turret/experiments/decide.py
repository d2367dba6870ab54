"""From evidence to a decision: pure functions that read no clock and no store.

The order is the policy:

1. errors or latency of a candidate or a shadow beyond its bound and beyond the control's: that arm goes, whatever the
   outcomes say
2. arms that cannot be compared (`validity`): the outcomes are void, for good; no verdict
3. a candidate that is worse than the control by more than the margin: it goes
4. a candidate that is better than the control: it is promoted where that was asked for and it is a discovery among all
   experiments of the store (`discoveries`), else named
5. otherwise: go on

Of a candidate whose true effect is none, a verdict `better` or `worse` comes in at most a share `level` of experiments,
`level` being alpha over the number of candidates. Each bound on errors or latency, and a margin above 0, has a level
of its own, of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from turret.experiments.experiment import Guards, Role

Verdict = Literal["better", "worse", "undecided", "void"]
Action = Literal["continue", "hold", "drop", "promote"]


@dataclass(frozen=True)
class Compared:
    """What is known of one candidate against the control; evidence as logarithms."""

    arm: str
    level: float
    better: float  # peaks
    worse: float
    worse_by: float  # worse by more than the guard's margin
    verdict: Verdict = "undecided"  # the first that the evidence reached
    turned: bool = False  # the outcomes since then have taken it back


@dataclass(frozen=True)
class Health:
    """How an arm answers beside the control; evidence as logarithms, -inf where there is no bound."""

    arm: str
    role: Role
    level: float
    errors: float
    slow: float
    said_errors: str = ""  # "12 of 80 answers were errors, at most 2% may be, and 1 of 75 of the control's"
    said_slow: str = ""


@dataclass(frozen=True)
class Decision:
    """What is to be done, and why, for one line."""

    action: Action
    arm: str | None
    why: str


def needed(level: float) -> float:
    """The logarithm of the evidence that decides: two sides, or two ways to pass a bound, share the level."""
    return math.log(2 / level)


def decide(
    compared: Sequence[Compared],
    health: Sequence[Health],
    guards: Guards,
    *,
    void: str | None,
    named: bool = True,
) -> Decision:
    """The first thing to be done; asked again after it was done.

    Args:
        void: why the arms cannot be compared, where that was found.
        named: whether the experiment is a discovery among all of the store.
    """
    for each in health:
        for evidence, said in ((each.errors, each.said_errors), (each.slow, each.said_slow)):
            if evidence >= needed(each.level):
                return Decision("drop", each.arm, said)
    if void is not None:
        return Decision("hold", None, void)
    if guards.worse_by is not None:
        for found in compared:
            if found.worse_by >= needed(found.level):
                return Decision("drop", found.arm, f"its outcomes are worse{_margin(guards)}")
    if guards.promote:
        winners = [found for found in compared if found.verdict == "better" and not found.turned]
        if winners and named:
            best = max(winners, key=lambda found: found.better)
            return Decision("promote", best.arm, "its outcomes are better")
    return Decision("continue", None, "the evidence decides nothing yet")


def _margin(guards: Guards) -> str:
    return f" by more than {guards.worse_by:g}" if guards.worse_by else ""
