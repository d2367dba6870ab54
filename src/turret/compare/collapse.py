"""Finds trainings that collapsed: they learnt nothing, while others of the same method did.

A mean over both kinds would describe neither. The skill of a training is 0 if its answers do not depend on the texts,
as with one answer to every text or with guesses, and 1 without an error. For classes it is kappa (Cohen 1960). For
texts it is how much closer an output is to its own reference than to others. A training has collapsed if its skill is
at most a quarter of the best seed's, and the best seed is clearly above guessing. A row has learnt nothing if every
seed is at the level of guessing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from turret.compare.results import CellResult, Output
from turret.data import Example
from turret.statistics import Floats
from turret.tasks import task_of

# --- losses -----------------------------------------------------------------------------------------------------------
# Tells from the losses of a training whether they stayed flat, rose, or were still falling at the end.
#
# Losses are means over equal stretches of the training, in order; `binned_losses` makes them.


BINS = 60
FEWEST = 8  # losses that are enough to tell
SHARE = 0.1  # of the whole fall; an exponential fall over 3 time constants falls by that much in its last quarter
FLAT = 0.02  # of the first losses


def binned_losses(losses: Sequence[float], most: int = BINS) -> list[float]:
    """The losses as means over at most `most` equal stretches."""
    if len(losses) <= most:
        return [float(each) for each in losses]
    return [float(part.mean()) for part in np.array_split(np.asarray(losses, dtype=float), most)]


def describe_losses(losses: Sequence[float]) -> str | None:
    """`loss flat at 0.69` or `loss rose from 0.70 to 2.31`; None if it fell, or if there are too few losses."""
    values = np.asarray(losses, dtype=float)
    if len(values) < FEWEST:
        return None
    first, last = (float(part.mean()) for part in _ends(values))
    if last > (1 + 5 * FLAT) * first:
        return f"loss rose from {first:.2f} to {last:.2f}"
    return f"loss flat at {last:.2f}" if last > (1 - FLAT) * first else None


def still_falling(losses: Sequence[float]) -> bool:
    """Whether the loss fell in the last quarter of a training, beyond chance, by a tenth of its whole fall or more.

    The learning rate usually ends at zero, which flattens every curve. So a fall is a sure sign that more steps would
    help, but a flat end does not prove that they would not.
    """
    values = np.asarray(losses, dtype=float)
    if len(values) < FEWEST or describe_losses(losses) is not None:
        return False
    quarter = len(values) // 4
    before, after = values[-2 * quarter : -quarter], values[-quarter:]
    fall = float(before.mean() - after.mean())
    error = math.sqrt(float(before.var(ddof=1) + after.var(ddof=1)) / quarter)
    first, last = (float(part.mean()) for part in _ends(values))
    return fall > 2 * error and fall >= SHARE * (first - last)


def _ends(values: Floats) -> tuple[Floats, Floats]:
    """The first and the last tenth, at least three losses each."""
    count = max(3, len(values) // 10)
    return values[:count], values[-count:]


# --- collapse ---------------------------------------------------------------------------------------------------------


PART = 0.25  # of the best seed's skill
CLEAR, BY_CHANCE = 5.0, 2.0  # standard errors above guessing: surely learnt; within chance of guessing


@dataclass(frozen=True)
class Collapse:
    """A training that learnt nothing while others of its method did."""

    seed: int
    score: float  # points
    why: str

    def __str__(self) -> str:
        return f"seed {self.seed} ({self.why})"


@dataclass(frozen=True)
class Learnt:
    """Which trainings of one row learnt nothing."""

    collapses: tuple[Collapse, ...] = ()
    nothing: bool = False  # no seed learnt anything

    @property
    def seeds(self) -> frozenset[int]:
        """The seeds that collapsed."""
        return frozenset(each.seed for each in self.collapses)


def judge_learning(own: Sequence[CellResult], examples: Sequence[Example]) -> Learnt:
    """Judge the trainings of one row. examples: the test examples, in the order of the answers."""
    skills = {each.seed: pair for each in own if each.version is not None and (pair := skill_of(each, examples))}
    if not skills:
        return Learnt()
    best, error = max(skills.values())
    if best >= CLEAR * error:
        low = [each for each in own if each.seed in skills and skills[each.seed][0] <= PART * best]
        return Learnt(tuple(Collapse(each.seed, 100 * float(each.scores.mean()), _why(each)) for each in low))
    return Learnt(nothing=all(value <= BY_CHANCE * chance for value, chance in skills.values()))


def skill_of(result: CellResult, examples: Sequence[Example]) -> tuple[float, float] | None:
    """The skill of a training, and the standard error that it would have by guessing. None if it cannot be computed.

    skill = (score - g) / (1 - g), where g is the score of answers that do not depend on the texts.
    """
    score, count = float(result.scores.mean()), len(result.scores)
    task = task_of(result.kind)
    if task.right_or_wrong:
        guess = 0.5 if task.two_answers else _agreement_by_chance(_given(result), _true(result, examples))
        spread = guess * (1 - guess)
    elif result.guess is not None:
        guess, spread = result.guess, float(result.scores.var())
    else:
        return None
    if guess >= 1:
        return None  # there is only one class, so guessing is always right
    return (score - guess) / (1 - guess), max(1e-6, math.sqrt(spread / count) / (1 - guess))


def _agreement_by_chance(given: Sequence[Hashable], true: Sequence[Hashable]) -> float:
    """The share of right answers if they were dealt to the texts at random."""
    times = Counter(given)
    return sum(times[label] * count for label, count in Counter(true).items()) / max(1, len(given) * len(true))


def _given(result: CellResult) -> list[Hashable]:
    """What the answers say, as far as it is right or wrong: for a number that is judged as yes or no, only that."""
    least = task_of(result.kind).yes_from
    if least is None:
        return [_key(each) for each in result.answers]
    return [float(str(each)) >= least for each in result.answers]


def _true(result: CellResult, examples: Sequence[Example]) -> list[Hashable]:
    """What is right, in the same form. Of yes and no the scores tell it: the unit of the examples is the version's."""
    if task_of(result.kind).yes_from is None:
        return [_key(each.output) for each in examples]
    return [said == (score > 0.5) for said, score in zip(_given(result), result.scores.tolist(), strict=True)]


def _key(label: Output) -> Hashable:
    return label if isinstance(label, str) else tuple(sorted(label))


def _why(result: CellResult) -> str:
    """The signs of a collapse in losses and answers, in a few words."""
    signs = [f"score {100 * float(result.scores.mean()):.1f}"]
    signs += filter(None, [describe_losses(result.losses)])
    _, times = Counter(_given(result)).most_common(1)[0]
    if times > 0.95 * len(result.answers):
        signs.append(f"one answer to {100 * times / len(result.answers):.0f}% of the texts")
    return ", ".join(signs)
