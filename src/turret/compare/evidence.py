"""How far two methods are apart, and how sure that is: plain numpy on scores of the same examples under several seeds.

Axes: S seeds (trainings), N test examples. Everything here is about `d: (S, N)`, what one method scored less what
another scored, example by example and seed by seed. Both axes are samples: another training and another test set would
give other numbers, so both are resampled. Refuses to know models, methods and what a point is.

The model behind it: d[s, i] = mean + seed_s + example_i + rest_si. The mean of d then has the variance
`between_seeds / S + between_examples / N + rest / (S N)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtrit

Array = npt.NDArray[np.float64]
RESAMPLES = 4000
MOST_EXAMPLES = 20_000  # that are resampled one by one; larger test sets are taken in groups of equal size


@dataclass(frozen=True)
class Interval:
    """A mean and what it may be by chance: `low` to `high` holds the truth in `confidence` of all repetitions."""

    mean: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def open(self) -> bool:
        """Whether it leaves nearly everything possible: half of all that a difference in points may be, or more."""
        return self.high - self.low >= 100

    def times(self, factor: float) -> Interval:
        return Interval(factor * self.mean, factor * self.low, factor * self.high, self.confidence)


@dataclass(frozen=True)
class Components:
    """Where the differences come from, as variances of d's parts."""

    seeds: int
    examples: int
    between_seeds: float
    between_examples: float
    rest: float

    def variance(self, seeds: int, examples: int) -> float:
        """Of the mean over so many seeds and examples."""
        return self.between_seeds / seeds + self.between_examples / examples + self.rest / (seeds * examples)

    def freedom(self, seeds: int, examples: int) -> float:
        """Degrees of freedom of that variance (Satterthwaite 1946): few where the few seeds make most of it."""
        parts = [(self.between_examples / examples + self.rest / (seeds * examples), examples - 1)]
        if seeds > 1:
            parts.append((self.between_seeds / seeds + self.rest / (seeds * examples), seeds - 1))
        below = sum(part**2 / max(free, 1) for part, free in parts)
        return max(1.0, sum(part for part, _ in parts) ** 2 / below) if below > 0 else 1e6

    def half_width(self, seeds: int, examples: int, confidence: float) -> float:
        """Of the interval that so many seeds and examples would give."""
        quantile = float(stdtrit(self.freedom(seeds, examples), 0.5 + confidence / 2))
        return quantile * math.sqrt(self.variance(seeds, examples))


def components(d: Array) -> Components:
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
    d: Array,
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    between: tuple[float, float] | None = None,
) -> Interval:
    """The mean of d with a hierarchical bootstrap interval: seeds and examples are both drawn anew. d: (S, N).

    A draw is `mean + (mean of the drawn seeds - mean) + (mean of the drawn examples - mean)`, so what is neither a
    seed's nor an example's own counts twice and not, as in drawing whole rows and columns, three times. Two mends make
    it hold for few seeds and few errors, and the tests' simulations say that it does:
    - seeds are few, so their part is widened by sqrt(S / (S - 1)) and the whole by the t quantile that its degrees of
      freedom ask for. One seed says nothing about others: then the interval is about that one training
    - one example on each side is added (after Bonett & Price 2012), or no disagreement among fifty examples would pass
      for certainty. between: the least and the most that a score can be, where d is no difference
    Scores lie between 0 and 1, so a difference lies between -1 and 1, and so does its interval: what is cut off could
    not be true.
    """
    widened = with_one_more_each_way(grouped(d), between)
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


def with_one_more_each_way(d: Array, between: tuple[float, float] | None = None) -> Array:
    """(S, N + 2): one example more on each side, as far out as those that differ at all usually are; the first of them
    that is not there yet counts as far out as can be. between: how far that is, where d is no difference."""
    if between is None:
        each = d.mean(0)  # (N,)
        apart = each[each != 0]
        size = math.sqrt((float((apart**2).sum()) + 1) / (len(apart) + 1))
        between = (-size, size)
    return np.concatenate([d, np.tile(between, (d.shape[0], 1))], axis=1)


def grouped(d: Array) -> Array:
    """(S, N) with at most MOST_EXAMPLES columns: beyond that the means of groups of neighbours."""
    seeds, examples = d.shape
    if examples <= MOST_EXAMPLES:
        return d
    size = -(-examples // MOST_EXAMPLES)
    whole = examples // size * size
    means: Array = d[:, :whole].reshape(seeds, whole // size, size).mean(2)
    return means


def mcnemar(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> tuple[int, int, float]:
    """(only the first right, only the second right, exact two-sided p) of two classifiers on the same examples (N,).

    p is that of as uneven a split of the disagreements, were each as likely to fall to either (McNemar 1947).
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return only_first, only_second, sign_test(only_first, only_second)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of so many wins and losses, were each as likely."""
    total, fewer = wins + losses, min(wins, losses)
    if total == 0:
        return 1.0
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def rate(times: int, trials: int, confidence: float = 0.95) -> Interval:
    """How often something happens, in points, with the exact interval of Clopper and Pearson (1934)."""
    rest, level = trials - times, (1 - confidence) / 2
    low = 0.0 if not times else float(betaincinv(times, rest + 1, level))
    high = 1.0 if not rest else float(betaincinv(times + 1, rest, 1 - level))
    return Interval(times / trials, low, high, confidence).times(100)


def sign_flips(d: Array, generator: np.random.Generator, resamples: int = RESAMPLES) -> float:
    """Two-sided p that the mean over examples is zero, for these trainings: signs are flipped at random.

    d: (S, N); the mean over seeds comes first, so an example counts once however many seeds there are.
    """
    each = grouped(d).mean(0)  # (N,)
    seen = abs(float(each.sum()))
    if not seen:
        return 1.0
    extreme = 0
    for start in range(0, resamples, 500):
        count = min(500, resamples - start)
        signs = generator.integers(0, 2, size=(count, len(each))) * 2 - 1
        extreme += int((np.abs(signs @ each) >= seen - 1e-12).sum())
    return (extreme + 1) / (resamples + 1)
