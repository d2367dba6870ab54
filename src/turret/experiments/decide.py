"""The policy from evidence to a decision, as pure functions.

The first rule that applies decides:

1. errors or latency of a candidate or shadow exceed their bound and those of the control: drop the arm, whatever its
   outcomes
2. the arms cannot be compared (`turret.experiments.validity`): the outcomes are void permanently, and there is no
   verdict
3. a candidate is worse than the control by more than the margin: drop it
4. a candidate is better than the control: promote it, if the guards say so and it is a discovery among all experiments
   of the store (`turret.experiments.discoveries`)
5. otherwise: continue

If a candidate has no true effect, it gets a verdict `better` or `worse` in at most a share `level` of experiments.
`level` is alpha divided by the number of candidates. A margin above 0 has its own level of the same size. Bounds on
errors and latency have a rate of false alarms instead, because they watch for as long as the experiment runs
(`turret.experiments.guarding`).
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
    """The evidence of one candidate against the control, as logarithms."""

    arm: str
    level: float
    better: float  # highest evidence so far
    worse: float
    worse_by: float  # worse by more than the guard's margin
    verdict: Verdict = "undecided"  # the first that the evidence reached
    turned: bool = False  # later outcomes have reversed the verdict


@dataclass(frozen=True)
class Health:
    """What the detectors say about the answers of an arm."""

    arm: str
    role: Role
    alarms: tuple[str, ...]  # such as "12 of its last 80 answers were errors, the limit is 2%; ..."


@dataclass(frozen=True)
class Decision:
    """What to do, and why, on one line."""

    action: Action
    arm: str | None
    why: str


def needed(level: float) -> float:
    """The log evidence that decides. Two sides, or two ways to exceed a bound, share the level."""
    return math.log(2 / level)


def decide(
    compared: Sequence[Compared],
    health: Sequence[Health],
    guards: Guards,
    *,
    void: str | None,
    named: bool = True,
) -> Decision:
    """The first thing to do. Call it again after it was done.

    Args:
        void: the check that found that the arms cannot be compared, or None.
        named: whether the experiment is a discovery among all experiments of the store.
    """
    for each in health:
        if each.alarms:
            return Decision("drop", each.arm, each.alarms[0])
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
    return Decision("continue", None, "the evidence is not decisive yet")


def _margin(guards: Guards) -> str:
    return f" by more than {guards.worse_by:g}" if guards.worse_by else ""
