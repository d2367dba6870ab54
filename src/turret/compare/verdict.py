"""Is one method as good as another, on this evidence? Four words, each with its error kept under a stated rate.

Knows intervals and a margin. Refuses to know means without intervals: there is no verdict from them.

- `worse`: the whole interval lies below minus the margin
- `better`: the whole interval lies above zero, and reaches beyond the margin
- `within`: the whole interval lies above minus the margin: as good, up to the margin
- `undecided`: none of these yet
With 95% intervals each of the first three is said wrongly at most once in forty. One training a method never decides.

An interval is about trainings that do not collapse (`collapse`): no interval over a few seeds could cover a mean that
one collapse in five moves by many points. Collapses are counted beside it, with an interval of their own, and a method
that collapsed is never called as good or better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from turret.compare.evidence import (
    Array,
    Components,
    Interval,
    components,
    interval,
    rate,
    sign_flips,
    with_one_more_each_way,
)
from turret.compare.report_text import plus, rounded

Word = Literal["within", "worse", "better", "undecided"]
MOST_SEEDS = 50  # more than that is no advice
MOST_EXAMPLES = 200  # times as many as there are


@dataclass(frozen=True)
class Verdict:
    """What may be said of a method against the one it is compared with."""

    word: Word
    difference: Interval  # of the means, in points: hundredths of the metric
    margin: float  # points
    seeds: int
    examples: int
    p: float  # of no difference on these trainings: signs of the examples' differences flipped at random
    more_seeds: int | None = None  # that would settle it, if the difference stays what it is
    more_examples: int | None = None  # or so many more test examples, where seeds alone would not
    collapsed: tuple[int, ...] = ()  # seeds of this method, which are left out of the interval
    trainings: int = 0  # of this method, the collapsed ones too
    collapse_rate: Interval | None = None  # points
    claimed: bool = True  # whether the interval claims anything: not where no pair of trainings learnt

    def sentence(self, against: str = "full fine-tuning") -> str:
        """One sentence, with the interval in it, and with the collapses that it leaves out."""
        points = f"{self.margin:g} point" + ("" if self.margin == 1 else "s")
        span, lost = self.span(), self.collapses()
        if lost:
            span = f"{lost}; in the others {span}" if self.claimed else f"{lost}; no interval is claimed"
        if self.word == "within":
            return f"as good as {against} within {points} ({span})"
        if self.word == "better":
            return f"better than {against} ({span})"
        if self.word == "worse":
            return f"worse than {against} by more than {points} ({span})"
        return f"undecided against {against} ({span}): {self.advice()}"

    def span(self) -> str:
        """`-0.4 points, 95% interval -1.2 to +0.3`."""
        d = self.difference
        if d.open:
            return f"{plus(d.mean)} points, not determined by so little"
        return f"{plus(d.mean)} points, {round(100 * d.confidence)}% interval {plus(d.low)} to {plus(d.high)}"

    def collapses(self) -> str:
        """`2 of 5 trainings collapsed: seeds 43 and 45`, or nothing."""
        if not self.collapsed:
            return ""
        seeds = (
            " and ".join(map(str, self.collapsed)) if len(self.collapsed) < 3 else ", ".join(map(str, self.collapsed))
        )
        return (
            f"{len(self.collapsed)} of {self.trainings} trainings collapsed: "
            f"seed{'' if len(self.collapsed) == 1 else 's'} {seeds}"
        )

    def advice(self) -> str:
        """What would settle it."""
        if self.collapsed:
            return "a lower rate or a longer warm-up may keep it from collapsing"
        if self.seeds < 2:
            return "one seed decides nothing; give at least two"
        if self.more_seeds is not None:
            return f"about {self.more_seeds} more seed{'' if self.more_seeds == 1 else 's'} would settle it"
        if self.more_examples is not None:
            return f"more seeds would not settle it, about {rounded(self.more_examples)} more test examples would"
        return "the difference is too near the margin for seeds or examples to settle it; widen the margin"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.sentence()}


def judge(
    d: Array,
    margin: float,
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 4000,
    collapsed: Sequence[int] = (),
    trainings: int | None = None,
    claimed: bool = True,
) -> Verdict:
    """The verdict on differences of scores between 0 and 1.

    Args:
        d: (S, N), seeds by test examples, of trainings that did not collapse on either side; where there is no such
            pair, of all, with `claimed` false.
        margin: points.
        collapsed: seeds of the trainings of this method that collapsed, `trainings` of how many.
    """
    seeds, examples = d.shape
    found = interval(d, generator, confidence=confidence, resamples=resamples).times(100)
    trainings = seeds if trainings is None else trainings
    word = _word(found, margin) if seeds > 1 and claimed else "undecided"
    if collapsed and word in ("within", "better"):
        word = "undecided"
    p = sign_flips(d, generator, resamples)
    more: tuple[int | None, int | None] = (None, None)
    if word == "undecided" and seeds > 1 and not collapsed:
        more = _what_would_settle(found, margin, components(100 * with_one_more_each_way(d)))
    share = rate(len(collapsed), trainings, confidence)
    return Verdict(
        word, found, margin, seeds, examples, p, *more,
        collapsed=tuple(collapsed), trainings=trainings, collapse_rate=share, claimed=claimed,
    )  # fmt: skip


def _word(found: Interval, margin: float) -> Word:
    if found.high < -margin:
        return "worse"
    if found.low > 0 and found.high > margin:
        return "better"
    return "within" if found.low >= -margin else "undecided"


def _what_would_settle(found: Interval, margin: float, parts: Components) -> tuple[int | None, int | None]:
    """(more seeds, None), (None, more examples) or (None, None), were the mean to stay where it is."""
    seeds, examples, level = parts.seeds, parts.examples, found.confidence
    now = parts.half_width(seeds, examples, level)
    scale = max(found.high - found.mean, found.mean - found.low) / now if now > 0 else 1.0

    def settled(more_seeds: int, more_examples: int) -> bool:
        half = scale * parts.half_width(seeds + more_seeds, examples + more_examples, level)
        return _word(Interval(found.mean, found.mean - half, found.mean + half, level), margin) != "undecided"

    for more in range(1, MOST_SEEDS + 1):
        if settled(more, 0):
            return more, None
    most = MOST_EXAMPLES * examples
    if not settled(MOST_SEEDS, most):
        return None, None
    low, high = 0, most  # fewest examples that settle it with the seeds there are, or with as many as is reasonable
    extra = 0 if settled(0, most) else MOST_SEEDS
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if settled(extra, middle) else (middle, high)
    return None, high
