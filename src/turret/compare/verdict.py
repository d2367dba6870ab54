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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from turret.compare.evidence import Interval, components, grouped, interval, rate, with_pseudo_examples
from turret.compare.report_text import plus, rounded
from turret.statistics import Floats, sign_flips, smallest

Word = Literal["within", "worse", "better", "undecided"]
Remedy = tuple[int | None, int | None, float | None]  # more seeds, more examples, share of cases that they settle
MOST_SEEDS = 50  # the most to advise
MOST_EXAMPLES = 200  # the most to advise, in multiples of the present number
SETTLES = (0.7, 0.5)  # of cases: the advice is the least that settles it in the first of these shares, or else the next
ENOUGH_SEEDS = 5  # fewer do not tell how much trainings vary, so examples alone are never advised
LUCK = 1.5  # points: the least standard deviation between trainings that the careful half of the futures expects
FUTURES = 1000  # that are simulated for each advice


@dataclass(frozen=True)
class Verdict:
    """The verdict on a method against the baseline."""

    word: Word
    difference: Interval  # of the means, in points: hundredths of the metric
    margin: float  # points
    seeds: int
    examples: int
    p: float  # of no difference on these trainings, by a sign-flip test
    more_seeds: int | None = None  # that would settle it, together with `more_examples` where both are given
    more_examples: int | None = None  # test examples that would settle it, if more seeds alone would not
    settles: float | None = None  # share of cases in which they would
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
        wanted = []
        if self.more_seeds is not None:
            wanted.append(f"{self.more_seeds} more seed{'' if self.more_seeds == 1 else 's'}")
        if self.more_examples is not None:
            wanted.append(f"{rounded(self.more_examples)} more test examples")
        if wanted:
            often = "" if self.settles is None else f" in about {round(100 * self.settles)}% of cases"
            together = " together" if len(wanted) > 1 else ""
            return f"about {' and '.join(wanted)}{together} would settle it{often}"
        seeds = "" if self.fixed else f"{MOST_SEEDS} more seeds with "
        most = f"{seeds}{MOST_EXAMPLES} times the test examples"
        return f"not even {most} would settle it in {SETTLES[-1]:.0%} of cases; widen the margin"


def judge(
    d: Floats,
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
    p = sign_flips(grouped(d).mean(0), generator, resamples)  # over seeds first: each example counts once
    more: Remedy = (None, None, None)
    if word == "undecided" and enough and not collapsed:
        more = _what_would_settle(100 * d, margin, confidence, fixed)
    share = rate(len(collapsed), trainings, confidence)
    return Verdict(
        word,
        difference,
        margin,
        seeds,
        examples,
        p,
        *more,
        collapsed=tuple(collapsed),
        trainings=trainings,
        collapse_rate=share,
        claimed=claimed,
        fixed=fixed,
    )


def _word(difference: Interval, margin: float) -> Word:
    if difference.high < -margin:
        return "worse"
    if difference.low > 0 and difference.high > margin:
        return "better"
    return "within" if difference.low >= -margin else "undecided"


def _what_would_settle(d: Floats, margin: float, confidence: float, fixed: bool) -> Remedy:
    """The least that settles it often enough: more seeds, or else examples, or else both. d: (S, N), points."""
    futures = Futures.after(d, margin)
    seeds, examples = d.shape

    def settled(more_seeds: int, more_examples: int) -> float:
        middle, half = futures.intervals(more_seeds, more_examples, confidence)
        low, high = middle - half, middle + half
        decided = (high < -margin) | (low >= -margin) | ((low > 0) & (high > margin))  # as `_word` says
        return float(decided.reshape(2, -1).mean(1).min())

    most = MOST_EXAMPLES * examples
    extras = [each for each in (seeds, 3 * seeds, 7 * seeds) if each < MOST_SEEDS]
    for share in SETTLES:
        more = None if fixed else _fewest(lambda more: settled(more, 0), MOST_SEEDS, share)
        if more is not None:
            return more, None, settled(more, 0)
        for extra in (0,) if fixed else (*([0] if seeds >= ENOUGH_SEEDS else []), *extras, MOST_SEEDS):
            more = _fewest(partial(settled, extra), most, share)
            if more is not None:
                return extra or None, more, settled(extra, more)
    return None, None, None


def _fewest(settled: Callable[[int], float], most: int, share: float) -> int | None:
    """The smallest number that settles it in that share of cases, within 2%; None if not even `most` does."""
    return smallest(lambda more: settled(more) >= share, high=most, most=most, within=0.02)


@dataclass(frozen=True)
class Futures:
    """What the mean difference and its interval may become with more seeds and examples, given those that ran.

    The true variances and the true mean are not known. So each future draws them from what the present leaves possible
    (the fiducial distribution of the model in `evidence`), and then draws the new trainings and examples. The first
    half of the futures takes every true mean to be equally likely beforehand. The second half takes means of the
    size of the margin to be usual, which are harder to settle. All in points, with F futures.
    """

    seeds: int
    examples: int
    mean: float
    rest: float  # variance
    added: float  # to the variance between examples, by `evidence.with_pseudo_examples`, times the number of examples
    rows: float  # sum of squares of the rows' means
    between_seeds: Floats  # (F,) variances
    between_examples: Floats  # (F,)
    by_seeds: Floats  # (F,) error of the present mean that the seeds explain
    by_examples: Floats  # (F,)
    by_rest: Floats  # (F,)
    columns: float  # variance of the columns' means

    @classmethod
    def after(cls, d: Floats, margin: float) -> Futures:
        """Futures drawn from the results so far. d: differences of S seeds on N examples, (S, N)."""
        seeds, examples = d.shape
        rng = np.random.default_rng(0)  # the same for every number of seeds and examples, so that more is never less
        rest = components(d).rest
        of_rows = float(d.mean(1).var(ddof=1)) if seeds > 1 else 0.0
        of_columns = float(with_pseudo_examples(d / 100).mean(0).var(ddof=1)) * 1e4
        own = float(d.mean(0).var(ddof=1))
        free = max(1, seeds - 1)
        second = np.arange(FUTURES) >= FUTURES // 2
        usual_rows = LUCK**2 + rest / examples
        rows = np.where(
            second & (seeds > 1),
            (of_rows * free + 2 * max(of_rows, usual_rows)) / rng.chisquare(free + 2, FUTURES),
            of_rows * free / rng.chisquare(free, FUTURES),
        )
        columns = max(own, of_columns) * (examples - 1) / rng.chisquare(examples - 1, FUTURES)
        between_seeds = np.maximum(0.0, rows - rest / examples)
        between_examples = np.maximum(0.0, columns - rest / seeds)
        variances = np.stack([between_seeds / seeds, between_examples / examples, np.full(FUTURES, rest / d.size)])
        whole = np.maximum(1e-12, variances.sum(0))
        errors = np.sqrt(variances) * rng.standard_normal((3, FUTURES))
        mean, usual = float(d.mean()), max(margin, 0.1) ** 2
        near = mean * whole / (usual + whole) + np.sqrt(usual * whole / (usual + whole)) * rng.standard_normal(FUTURES)
        errors += np.where(second, (near - errors.sum(0)) * variances / whole, 0.0)
        return cls(
            seeds=seeds,
            examples=examples,
            mean=mean,
            rest=rest,
            added=max(0.0, of_columns - own) * examples,
            rows=of_rows * (seeds - 1),
            columns=own,
            between_seeds=between_seeds,
            between_examples=between_examples,
            by_seeds=errors[0],
            by_examples=errors[1],
            by_rest=errors[2],
        )

    def intervals(self, more_seeds: int, more_examples: int, confidence: float) -> tuple[Floats, Floats]:
        """(middles, half widths) (F,) with so many more seeds and examples."""
        rng = np.random.default_rng(1)
        seeds, examples = self.seeds + more_seeds, self.examples + more_examples
        z = rng.standard_normal((3, FUTURES))
        true = self.mean - self.by_seeds - self.by_examples - self.by_rest
        of_seeds = (self.seeds * self.by_seeds + np.sqrt(more_seeds * self.between_seeds) * z[0]) / seeds
        of_examples = (
            self.examples * self.by_examples + np.sqrt(more_examples * self.between_examples) * z[1]
        ) / examples
        old, whole = self.seeds * self.examples, seeds * examples
        of_rest = (old * self.by_rest + math.sqrt((whole - old) * self.rest) * z[2]) / whole
        middle = true + of_seeds + of_examples + of_rest
        # the variances as they will be estimated
        row = self.between_seeds + self.rest / examples  # (F,) variance of a row's mean
        squares = np.zeros(FUTURES)
        if self.seeds > 1:
            shrunk = row / np.maximum(1e-12, self.between_seeds + self.rest / self.examples)
            squares = self.rows * np.minimum(1.0, shrunk)
            if more_seeds:
                squares = squares + row * rng.chisquare(more_seeds, FUTURES)
        own = self.between_examples + self.rest / seeds + self.added / examples  # (F,)
        if not more_seeds:
            own = (self.columns * self.examples + own * more_examples) / examples + self.added / examples
        rest = self.rest / (seeds * examples)
        by_examples = np.maximum(0.0, own - self.rest / seeds) / examples
        below = (by_examples + rest) ** 2 / (examples - 1)
        by_seeds = np.zeros(FUTURES)
        if seeds > 1:
            by_seeds = np.maximum(0.0, squares / (seeds - 1) - self.rest / examples) / seeds
            below = below + (by_seeds + rest) ** 2 / (seeds - 1)
        freedom = np.maximum(1.0, (by_seeds + by_examples + 2 * rest) ** 2 / np.maximum(below, 1e-300))
        if seeds == 1:
            freedom = np.full(FUTURES, float(examples - 1))
        return middle, stdtrit(freedom, 0.5 + confidence / 2) * np.sqrt(by_seeds + by_examples + rest)
