"""The verdict on one method against another, from the interval of their difference and a margin.

- `worse`: the whole interval is below minus the margin
- `better`: the whole interval is above zero and reaches beyond the margin
- `within`: the whole interval is above minus the margin: as good, up to the margin
- `undecided`: none of these yet

With 95% intervals each of the first three is wrong at most once in forty. One training per method never decides,
except where stored versions themselves are compared: then only the test examples are a sample.

The interval describes trainings that do not collapse (see `collapse`). If one in five collapses and costs many points,
no interval over a few seeds can cover the mean. So collapses are counted separately, with an interval of their own, and
a method that collapsed is never judged as good or better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from turret.compare.evidence import (
    Array,
    Components,
    Interval,
    components,
    interval,
    rate,
    sign_flips,
    with_pseudo_examples,
)
from turret.compare.report_text import plus, rounded

Word = Literal["within", "worse", "better", "undecided"]
MOST_SEEDS = 50  # the most to advise
MOST_EXAMPLES = 200  # the most to advise, in multiples of the present number


@dataclass(frozen=True)
class Verdict:
    """The verdict on a method against the baseline."""

    word: Word
    difference: Interval  # of the means, in points: hundredths of the metric
    margin: float  # points
    seeds: int
    examples: int
    p: float  # of no difference on these trainings, by a sign-flip test
    more_seeds: int | None = None  # that would settle it, if the difference stays the same
    more_examples: int | None = None  # test examples that would settle it, if more seeds would not
    collapsed: tuple[int, ...] = ()  # seeds of this method that the interval leaves out
    trainings: int = 0  # of this method, including those that collapsed
    collapse_rate: Interval | None = None  # points
    claimed: bool = True  # False: no pair of trainings learnt, so the interval claims nothing
    fixed: bool = False  # of two stored versions as they are: other trainings of their methods do not matter

    def sentence(self, against: str = "full fine-tuning") -> str:
        """The verdict in one sentence, with the interval and the collapses that it leaves out."""
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
            samples = "examples" if self.fixed else "examples and seeds"
            return f"{plus(d.mean)} points, not determined by so few {samples}"
        return f"{plus(d.mean)} points, {round(100 * d.confidence)}% interval {plus(d.low)} to {plus(d.high)}"

    def collapses(self) -> str:
        """`2 of 5 trainings collapsed: seeds 43 and 45`, or an empty text."""
        count = len(self.collapsed)
        if not count:
            return ""
        seeds = (" and " if count < 3 else ", ").join(map(str, self.collapsed))
        return f"{count} of {self.trainings} trainings collapsed: seed{'' if count == 1 else 's'} {seeds}"

    def advice(self) -> str:
        """What would settle it."""
        if self.collapsed:
            return "a lower rate or a longer warm-up may keep it from collapsing"
        if self.seeds < 2 and not self.fixed:
            return "one seed decides nothing; give at least two"
        if self.more_seeds is not None:
            return f"about {self.more_seeds} more seed{'' if self.more_seeds == 1 else 's'} would settle it"
        if self.more_examples is not None:
            more = f"about {rounded(self.more_examples)} more test examples would"
            return f"{more} settle it" if self.fixed else f"more seeds would not settle it, {more}"
        samples = "examples" if self.fixed else "seeds or examples"
        return f"the difference is too near the margin for {samples} to settle it; widen the margin"


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
    fixed: bool = False,
) -> Verdict:
    """The verdict on differences of scores between 0 and 1.

    Args:
        d: (S, N), seeds by test examples, of trainings that did not collapse on either side. If there is no such pair,
            of all trainings, with `claimed` false.
        margin: points.
        generator: draws the samples of the interval and the test.
        collapsed: seeds of this method that collapsed.
        trainings: number of trainings of this method, including those that collapsed; None: S.
        fixed: two stored versions are judged as they are, so that S = 1 is enough.
    """
    seeds, examples = d.shape
    difference = interval(d, generator, confidence=confidence, resamples=resamples).times(100)
    trainings = seeds if trainings is None else trainings
    enough = seeds > 1 or fixed
    word = _word(difference, margin) if enough and claimed else "undecided"
    if collapsed and word in ("within", "better"):
        word = "undecided"
    p = sign_flips(d, generator, resamples)
    more: tuple[int | None, int | None] = (None, None)
    if word == "undecided" and enough and not collapsed:
        more = _what_would_settle(difference, margin, components(100 * with_pseudo_examples(d)))
    share = rate(len(collapsed), trainings, confidence)
    return Verdict(
        word, difference, margin, seeds, examples, p, *more,
        collapsed=tuple(collapsed), trainings=trainings, collapse_rate=share, claimed=claimed, fixed=fixed,
    )  # fmt: skip


def _word(difference: Interval, margin: float) -> Word:
    if difference.high < -margin:
        return "worse"
    if difference.low > 0 and difference.high > margin:
        return "better"
    return "within" if difference.low >= -margin else "undecided"


def _what_would_settle(difference: Interval, margin: float, parts: Components) -> tuple[int | None, int | None]:
    """(more seeds, None), (None, more examples) or (None, None), if the mean stays the same."""
    seeds, examples, level, mean = parts.seeds, parts.examples, difference.confidence, difference.mean
    now = parts.half_width(seeds, examples, level)
    scale = max(difference.high - mean, mean - difference.low) / now if now > 0 else 1.0

    def settled(more_seeds: int, more_examples: int) -> bool:
        half = scale * parts.half_width(seeds + more_seeds, examples + more_examples, level)
        return _word(Interval(mean, mean - half, mean + half, level), margin) != "undecided"

    for more in range(1, MOST_SEEDS + 1):
        if settled(more, 0):
            return more, None
    most = MOST_EXAMPLES * examples
    if not settled(MOST_SEEDS, most):
        return None, None
    low, high = 0, most  # the fewest examples that settle it, with the present seeds or else with MOST_SEEDS more
    extra = 0 if settled(0, most) else MOST_SEEDS
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if settled(extra, middle) else (middle, high)
    return None, high
