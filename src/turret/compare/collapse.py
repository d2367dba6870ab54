"""Which trainings learnt nothing, while others of the same method did: a mean over both would say nothing of either.

Skill is what a training's answers have to do with their texts: 0 for one answer to every text or for guesses, whatever
the classes' shares are; 1 for no error. Of classes it is kappa (Cohen 1960); of texts, how much nearer an output is to
its own reference than to another's. A training has collapsed where its skill is a quarter or less of the best seed's
skill, and that one is clearly no guessing. A row whose every seed is at the level of guessing has learnt nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turret.compare.losses import course
from turret.compare.results import Result
from turret.tasks import task_of

PART = 0.25  # of the best seed's skill
CLEAR, BY_CHANCE = 5.0, 2.0  # standard errors above guessing: surely learnt; not told from guessing


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
    """How the trainings of one row went."""

    collapses: tuple[Collapse, ...] = ()
    nothing: bool = False  # no seed learnt anything

    @property
    def seeds(self) -> frozenset[int]:
        """Of the trainings that collapsed."""
        return frozenset(each.seed for each in self.collapses)


def learnt(own: Sequence[Result], examples: Sequence[Any]) -> Learnt:
    """What became of the trainings of one row. examples: the test examples, in the order of the answers."""
    found = {each.seed: pair for each in own if each.version is not None and (pair := skill(each, examples))}
    if not found:
        return Learnt()
    best, error = max(found.values())
    if best >= CLEAR * error:
        low = [each for each in own if each.seed in found and found[each.seed][0] <= PART * best]
        return Learnt(tuple(Collapse(each.seed, 100 * float(each.scores.mean()), _why(each)) for each in low))
    return Learnt(nothing=all(value <= BY_CHANCE * chance for value, chance in found.values()))


def skill(result: Result, examples: Sequence[Any]) -> tuple[float, float] | None:
    """(skill, its standard error were there none); None where it is not known."""
    score, count = float(result.scores.mean()), len(result.scores)
    if task_of(result.kind).right_or_wrong:
        guess = _agreement_by_chance(result.answers, [each.label for each in examples])
        spread = guess * (1 - guess)
    elif result.guess is not None:
        guess, spread = result.guess, float(result.scores.var())
    else:
        return None
    if guess >= 1:
        return None  # one class alone: nothing tells guessing from knowing
    return (score - guess) / (1 - guess), max(1e-6, math.sqrt(spread / count) / (1 - guess))


def _agreement_by_chance(answers: Sequence[Any], wanted: Sequence[Any]) -> float:
    """How often answers would be right that have nothing to do with their texts."""
    given, true = Counter(map(_key, answers)), Counter(map(_key, wanted))
    return sum(given[label] * count for label, count in true.items()) / max(1, len(answers) * len(wanted))


def _key(label: Any) -> Hashable:
    return label if isinstance(label, str) else tuple(sorted(label))


def _why(result: Result) -> str:
    """What its losses and answers show, in a few words."""
    said = [f"score {100 * float(result.scores.mean()):.1f}"]
    said += filter(None, [course(result.losses)])
    _, times = Counter(map(_key, result.answers)).most_common(1)[0]
    if times > 0.95 * len(result.answers):
        said.append(f"one answer to {100 * times / len(result.answers):.0f}% of the texts")
    return ", ".join(said)


def trained(own: Mapping[int, Result], collapsed: frozenset[int]) -> dict[int, Result]:
    """The results that did not collapse, by seed."""
    return {seed: each for seed, each in own.items() if seed not in collapsed}
