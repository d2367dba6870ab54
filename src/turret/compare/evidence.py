"""The difference of two methods with its interval and tests, from scores on the same examples with several seeds.

Axes: S seeds (trainings), N test examples. `d: (S, N)` is one method's score minus the other's, by seed and example.
Another training or another test set would give other numbers, so both axes are resampled.

The model is d[s, i] = mean + seed_s + example_i + rest_si, so the mean of d has the variance
`between_seeds / S + between_examples / N + rest / (S N)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtrit

from turret.statistics import Floats, sign_test

RESAMPLES = 4000
MOST_EXAMPLES = 20_000  # resampled one by one; larger test sets are resampled in groups of equal size


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval: `low` to `high` covers the true mean in `confidence` of all repetitions."""

    mean: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def open(self) -> bool:
        """Whether it tells nearly nothing: it covers half of the range of a difference in points, or more."""
        return self.high - self.low >= 100

    def times(self, factor: float) -> Interval:
        """The interval in another unit."""
        return Interval(factor * self.mean, factor * self.low, factor * self.high, self.confidence)


@dataclass(frozen=True)
class Components:
    """The variances of d's parts: seeds, examples, and the rest."""

    seeds: int
    examples: int
    between_seeds: float
    between_examples: float
    rest: float

    def variance(self, seeds: int, examples: int) -> float:
        """The variance of the mean over so many seeds and examples."""
        return self.between_seeds / seeds + self.between_examples / examples + self.rest / (seeds * examples)

    def freedom(self, seeds: int, examples: int) -> float:
        """The degrees of freedom of that variance (Satterthwaite 1946): few if it comes mostly from few seeds."""
        parts = [(self.between_examples / examples + self.rest / (seeds * examples), examples - 1)]
        if seeds > 1:
            parts.append((self.between_seeds / seeds + self.rest / (seeds * examples), seeds - 1))
        below = sum(part**2 / max(free, 1) for part, free in parts)
        return max(1.0, sum(part for part, _ in parts) ** 2 / below) if below > 0 else 1e6


def components(d: Floats) -> Components:
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
    confidence: float = 0.95,
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
    widened = with_pseudo_examples(grouped(d), between)
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
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    found = components(widened)
    quantile = float(stdtrit(found.freedom(seeds, examples), 0.5 + confidence / 2))
    wider = quantile / NormalDist().inv_cdf(0.5 + confidence / 2)
    mean = float(d.mean())
    least, most = (-1.0, 1.0) if between is None else between
    return Interval(
        mean,
        max(least, min(mean, middle + wider * (float(low) - middle))),
        min(most, max(mean, middle + wider * (float(high) - middle))),
        confidence,
    )


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


def grouped(d: Floats) -> Floats:
    """d with at most MOST_EXAMPLES columns: means of groups of neighbours if there are more."""
    seeds, examples = d.shape
    if examples <= MOST_EXAMPLES:
        return d
    size = -(-examples // MOST_EXAMPLES)
    whole = examples // size * size
    means: Floats = d[:, :whole].reshape(seeds, whole // size, size).mean(2)
    return means


def mcnemar(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> tuple[int, int, float]:
    """McNemar's exact test (1947) of two classifiers on the same examples.

    Args:
        first, second: (N,), whether each is right.

    Returns:
        How many only the first gets right, how many only the second, and the two-sided p.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return only_first, only_second, sign_test(only_first, only_second)


def rate(times: int, trials: int, confidence: float = 0.95) -> Interval:
    """A rate in points with its exact interval (Clopper & Pearson 1934)."""
    rest, level = trials - times, (1 - confidence) / 2
    low = 0.0 if not times else float(betaincinv(times, rest + 1, level))
    high = 1.0 if not rest else float(betaincinv(times + 1, rest, 1 - level))
    return Interval(times / trials, low, high, confidence).times(100)
