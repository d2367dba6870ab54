"""The difference of two methods with its interval and tests, and the verdict on it, with a margin.

Axes: S seeds (trainings), N test examples. `d: (S, N)` is one method's score minus the other's, by seed and example.
Another training or another test set would give other numbers, so both axes are resampled.

The model is d[s, i] = mean + seed_s + example_i + rest_si, so the mean of d has the variance
`between_seeds / S + between_examples / N + rest / (S N)`.

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
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtrit

from turret.compare.report_text import rounded_estimate, signed_ascii
from turret.statistics import Floats, sign_flips, sign_test, smallest

CONFIDENCE = 0.95  # of all intervals
LOW, HIGH = 0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2  # quantiles at their ends
RESAMPLES = 4000
MOST_RESAMPLED = 20_000  # resampled one by one; larger test sets are resampled in groups of equal size


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval: `low` to `high` covers the true mean in `confidence` of all repetitions."""

    mean: float
    low: float
    high: float
    confidence: float = CONFIDENCE

    @property
    def open(self) -> bool:
        """Whether it tells nearly nothing: it covers half of the range of a difference in points, or more."""
        return self.high - self.low >= 100

    def times(self, factor: float) -> Interval:
        """The interval in another unit."""
        return Interval(factor * self.mean, factor * self.low, factor * self.high)


@dataclass(frozen=True)
class Components:
    """The variances of d's parts: seeds, examples, and the rest."""

    seeds: int
    examples: int
    between_seeds: float
    between_examples: float
    rest: float

    def freedom(self, seeds: int, examples: int) -> float:
        """The degrees of freedom of the mean's variance over so many seeds and examples: few if few seeds make it.

        Source: Satterthwaite 1946.
        """
        parts = [(self.between_examples / examples + self.rest / (seeds * examples), examples - 1)]
        if seeds > 1:
            parts.append((self.between_seeds / seeds + self.rest / (seeds * examples), seeds - 1))
        below = sum(part**2 / max(free, 1) for part, free in parts)
        return max(1.0, sum(part for part, _ in parts) ** 2 / below) if below > 0 else 1e6


def variance_components(d: Floats) -> Components:
    """Moment estimates of the three variances, none below zero. d: (S, N)."""
    seeds, examples = d.shape
    rows, columns, whole = d.mean(1), d.mean(0), d.mean()
    if seeds == 1 or examples == 1:
        own = float(d.var(ddof=1)) if d.size > 1 else 0.0
        return Components(seeds, examples, own if examples == 1 else 0.0, own if seeds == 1 else 0.0, 0.0)
    left = d - rows[:, None] - columns[None, :] + whole  # (S, N)
    rest = float((left**2).sum() / ((seeds - 1) * (examples - 1)))
    return Components(
        seeds,
        examples,
        max(0.0, float(rows.var(ddof=1)) - rest / examples),
        max(0.0, float(columns.var(ddof=1)) - rest / seeds),
        rest,
    )


def interval(
    d: Floats,
    generator: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
    between: tuple[float, float] | None = None,
) -> Interval:
    """The mean of d with a bootstrap interval in which both seeds and examples are resampled.

    A draw is `mean + (mean of the drawn seeds - mean) + (mean of the drawn examples - mean)`. So the rest counts twice,
    not three times as in drawing whole rows and columns. Two corrections make the interval hold for few seeds and few
    errors, as simulations in the tests show:

    - The part of the seeds is widened by sqrt(S / (S - 1)), and the whole by the t quantile of its degrees of freedom.
      With one seed the interval is about that one training.
    - One pseudo-example is added on each side (after Bonett & Price 2012). Without them, no disagreement among fifty
      examples would give an interval of width zero.

    The interval is cut to the range of possible means.

    Args:
        d: (S, N), differences of scores between 0 and 1.
        generator: draws the samples.
        resamples: number of draws.
        between: the range of d if it is a score and not a difference; None: -1 to 1.
    """
    widened = with_pseudo_examples(group_columns(d), between)
    seeds, examples = widened.shape
    rows, columns = widened.mean(1), widened.mean(0)  # (S,), (N,)
    middle = float(rows.mean())
    stretch = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 0.0
    drawn = np.empty(resamples)
    for start in range(0, resamples, 500):  # (500, N) at a time
        count = min(500, resamples - start)
        w = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds  # (500, S)
        v = generator.multinomial(examples, np.full(examples, 1 / examples), size=count) / examples  # (500, N)
        drawn[start : start + count] = middle + stretch * (w @ rows - middle) + (v @ columns - middle)
    low, high = np.quantile(drawn, [LOW, HIGH])
    found = variance_components(widened)
    wider = float(stdtrit(found.freedom(seeds, examples), HIGH)) / NormalDist().inv_cdf(HIGH)
    mean = float(d.mean())
    least, most = (-1.0, 1.0) if between is None else between
    return Interval(
        mean,
        max(least, min(mean, middle + wider * (float(low) - middle))),
        min(most, max(mean, middle + wider * (float(high) - middle))),
    )


def rank_correlation_interval(scores: Floats) -> Interval:
    """Spearman's correlation, as a mean over seeds, with its interval on Fisher's scale z = atanh(r):

        tanh( mean z +- t sqrt( (1 + r^2 / 2) / (N - 3) + variance of z / S ) )

    The ranks of all examples change with each, so resampling their scores would give too narrow an interval.

    Source: Bonett and Wright 2000, Sample size requirements for estimating Pearson, Kendall and Spearman correlations.

    Args:
        scores: (S, N); the mean of each row is the correlation of a seed.
    """
    seeds, examples = scores.shape
    mean, most = float(scores.mean()), 1 - 1 / examples  # an order without a mistake is no certainty
    z = np.arctanh(np.clip(scores.mean(1), -most, most))  # (S,)
    between = float(z.var(ddof=1)) if seeds > 1 else 0.0
    found = Components(seeds, examples, between, (1 + mean**2 / 2) * examples / max(1, examples - 3), 0.0)
    spread = math.sqrt(found.between_seeds / seeds + found.between_examples / examples)
    half = float(stdtrit(found.freedom(seeds, examples), HIGH)) * spread
    return Interval(mean, min(mean, math.tanh(z.mean() - half)), max(mean, math.tanh(z.mean() + half)))


def with_pseudo_examples(d: Floats, between: tuple[float, float] | None = None) -> Floats:
    """Add an example on each side of zero, at the root mean square of the differences: (S, N) -> (S, N + 2).

    Zeros do not count for that mean, and one example with the largest difference does. between: the two values to add
    if d is a score and not a difference.
    """
    if between is None:
        each = d.mean(0)  # (N,)
        differing = each[each != 0]
        size = math.sqrt((float((differing**2).sum()) + 1) / (len(differing) + 1))
        between = (-size, size)
    return np.concatenate([d, np.tile(between, (d.shape[0], 1))], axis=1)


def group_columns(d: Floats) -> Floats:
    """d with at most MOST_RESAMPLED columns: means of groups of neighbours if there are more."""
    seeds, examples = d.shape
    if examples <= MOST_RESAMPLED:
        return d
    size = -(-examples // MOST_RESAMPLED)
    whole = examples // size * size
    return d[:, :whole].reshape(seeds, whole // size, size).mean(2)


def mcnemar(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> tuple[int, int, float]:
    """McNemar's exact test (1947) of two classifiers on the same examples.

    Args:
        first, second: (N,), whether each is right.

    Returns:
        How many only the first gets right, how many only the second, and the two-sided p.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return only_first, only_second, sign_test(only_first, only_second)


def rate(times: int, trials: int) -> Interval:
    """A rate in points with its exact interval (Clopper & Pearson 1934)."""
    rest, level = trials - times, (1 - CONFIDENCE) / 2
    low = 0.0 if not times else float(betaincinv(times, rest + 1, level))
    high = 1.0 if not rest else float(betaincinv(times + 1, rest, 1 - level))
    return Interval(times / trials, low, high).times(100)


# --- verdict ----------------------------------------------------------------------------------------------------------


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
            return f"{signed_ascii(d.mean)} points, not determined by so few {samples}"
        low, high = signed_ascii(d.low), signed_ascii(d.high)
        return f"{signed_ascii(d.mean)} points, {round(100 * d.confidence)}% interval {low} to {high}"

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
            wanted.append(f"{rounded_estimate(self.more_examples)} more test examples")
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
    resamples: int = RESAMPLES,
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
    difference = interval(d, generator, resamples=resamples).times(100)
    trainings = seeds if trainings is None else trainings
    enough = seeds > 1 or fixed
    word = _word(difference, margin) if enough and claimed else "undecided"
    if collapsed and word in ("within", "better"):
        word = "undecided"
    p = sign_flips(group_columns(d).mean(0), generator, resamples)  # over seeds first: each example counts once
    more: Remedy = (None, None, None)
    if word == "undecided" and enough and not collapsed:
        more = _what_would_settle(100 * d, margin, fixed)
    share = rate(len(collapsed), trainings)
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


def _what_would_settle(d: Floats, margin: float, fixed: bool) -> Remedy:
    """The least that settles it often enough: more seeds, or else examples, or else both. d: (S, N), points."""
    futures = Futures.after(d, margin)
    seeds, examples = d.shape

    def settled(more_seeds: int, more_examples: int) -> float:
        middle, half = futures.intervals(more_seeds, more_examples)
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
    (the fiducial distribution of the model in `judge`), and then draws the new trainings and examples. The first
    half of the futures takes every true mean to be equally likely beforehand. The second half takes means of the
    size of the margin to be usual, which are harder to settle. All in points, with F futures.
    """

    seeds: int
    examples: int
    mean: float
    rest: float  # variance
    added: float  # to the variance between examples, by `with_pseudo_examples`, times the number of examples
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
        rest = variance_components(d).rest
        of_rows = float(d.mean(1).var(ddof=1)) if seeds > 1 else 0.0
        of_columns = float(with_pseudo_examples(d / 100).mean(0).var(ddof=1)) * 1e4
        own = float(d.mean(0).var(ddof=1)) if examples > 1 else 0.0
        free, free_examples = max(1, seeds - 1), max(1, examples - 1)
        second = np.arange(FUTURES) >= FUTURES // 2
        usual_rows = LUCK**2 + rest / examples
        rows = np.where(
            second & (seeds > 1),
            (of_rows * free + 2 * max(of_rows, usual_rows)) / rng.chisquare(free + 2, FUTURES),
            of_rows * free / rng.chisquare(free, FUTURES),
        )
        columns = max(own, of_columns) * free_examples / rng.chisquare(free_examples, FUTURES)
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

    def intervals(self, more_seeds: int, more_examples: int) -> tuple[Floats, Floats]:
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
        below = (by_examples + rest) ** 2 / max(1, examples - 1)
        by_seeds = np.zeros(FUTURES)
        if seeds > 1:
            by_seeds = np.maximum(0.0, squares / (seeds - 1) - self.rest / examples) / seeds
            below = below + (by_seeds + rest) ** 2 / (seeds - 1)
        freedom = np.maximum(1.0, (by_seeds + by_examples + 2 * rest) ** 2 / np.maximum(below, 1e-300))
        if seeds == 1:
            freedom = np.full(FUTURES, float(max(1, examples - 1)))
        return middle, stdtrit(freedom, HIGH) * np.sqrt(by_seeds + by_examples + rest)
