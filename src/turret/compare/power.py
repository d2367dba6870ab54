"""The power of a design before anything is trained: how often `judge` would call two equal methods `within`.

The verdict's interval is simulated on d: (S, N), the difference of two methods' scores, with the variances of
`evidence.Components`. They are measured on earlier trainings, or assumed if there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

from turret.compare import report_text
from turret.compare.evidence import components
from turret.json_types import JsonObject
from turret.statistics import Floats, smallest
from turret.tasks import task_of

DRAWS, RESAMPLES = 1000, 300
ENOUGH = 0.8  # of designs like this one reach a verdict: the usual power
MOST_SEEDS = 50
MOST_EXAMPLES = 200_000
WITHIN = 0.05  # of the advice


@dataclass(frozen=True)
class Spread:
    """How much the difference of two methods varies, as standard deviations in points."""

    seeds: float  # from training to training, beyond what the test examples explain
    examples: float  # from example to example, the same in all trainings
    rest: float  # unexplained by both
    apart: float  # share of the examples on which the methods differ with some seed
    source: str  # "measured ..." or "assumed ..."

    @classmethod
    def assumed(cls, kind: str) -> Spread:
        """The spread before anything has run. kind: of the task."""
        if task_of(kind).right_or_wrong:
            source = "assumed: 0.8 points per seed, 1 example in 10 right for one method only"
            return cls(0.8, 100 * math.sqrt(0.06), 100 * math.sqrt(0.04), 0.2, source)
        return cls(0.8, 8.0, 12.0, 1.0, "assumed: 0.8 points per seed, 14 points per example")

    @classmethod
    def measured(cls, differences: Sequence[Floats]) -> Spread | None:
        """The spread of pairs of rows that have run; None if no pair has two seeds. differences: (S, N) each."""
        usable = [d for d in differences if d.shape[0] > 1 and d.shape[1] > 1]
        if not usable:
            return None
        parts = [components(100 * d) for d in usable]
        seeds, examples, rest = (
            math.sqrt(float(np.mean(variances)))
            for variances in zip(
                *((each.between_seeds, each.between_examples, each.rest) for each in parts), strict=True
            )
        )
        apart = float(np.mean([(d != 0).any(0).mean() for d in usable]))
        count = max(d.shape[0] for d in usable)
        return cls(seeds, examples, rest, max(apart, 0.01), f"measured on the {count} seeds that have run")


@dataclass(frozen=True)
class Power:
    """What one design can decide."""

    seeds: int
    examples: int
    margin: float
    within: float  # how often equal methods would be judged as good
    at_ten_times: float  # the same with ten times the test examples
    decides: float | None  # points: the margin within which equal methods would be judged as good in 8 of 10 cases
    shows_worse: float | None  # points: a method that is truly this far behind would be judged worse in 8 of 10 cases
    more_examples: int | None  # further test examples for 8 of 10, with these seeds
    more_seeds: int | None  # further seeds for 8 of 10, with these examples
    both: tuple[int, int] | None  # (further seeds, further examples) if neither alone is enough
    spread: Spread

    def as_json(self) -> JsonObject:
        """The fields, and the sentences for people."""
        return {**asdict(self), "sentences": list(self.sentences())}

    def sentences(self) -> tuple[str, ...]:
        """For people: what the design can decide, what would be enough, and the spread behind it."""
        if self.decides is None or self.shows_worse is None:
            return ("one seed decides nothing; give at least two",)
        more = report_text.rounded(10 * self.examples)
        first = (
            f"if two methods are equally good, {self.seeds} seeds and {self.examples:,} test examples show that they "
            f"are within {_points(self.margin)} in {report_text.share(self.within)} of comparisons; {more} test "
            f"examples would in {report_text.share(self.at_ten_times)}"
        )
        second = (
            f"8 of 10 comparisons like this one show equal methods to be within {_points(self.decides)}, and a method "
            f"that is {_points(self.shows_worse)} behind to be worse"
        )
        return (first, second, self.advice(), f"the spread of the differences is {self.spread.source}")

    def advice(self) -> str:
        """What would be enough to decide within the margin."""
        if self.within >= ENOUGH:
            return "enough for this margin"
        options = []
        if self.more_examples is not None:
            options.append(f"about {report_text.rounded(self.more_examples)} more test examples")
        if self.more_seeds is not None:
            options.append(f"about {self.more_seeds} more seeds")
        if self.both is not None and not options:
            seeds, examples = self.both
            options.append(f"about {seeds} more seeds and {report_text.rounded(examples)} more test examples")
        if not options:
            return f"widen the margin to {_points(self.decides or self.margin)}"
        return f"{', or '.join(options)} would decide within {_points(self.margin)}"


def power(spread: Spread, seeds: int, examples: int, margin: float, *, confidence: float = 0.95) -> Power:
    """The power of a design with so many seeds per method and test examples. margin: points."""

    def reached(seeds: int, examples: int) -> float:
        return float((simulated(spread, seeds, examples, confidence)[0] <= margin).mean()) if seeds > 1 else 0.0

    if seeds < 2:
        return Power(seeds, examples, margin, 0.0, 0.0, None, None, None, None, None, spread)
    below, above = simulated(spread, seeds, examples, confidence)
    within = float((below <= margin).mean())
    more_examples = more_seeds = both = None
    if within < ENOUGH:
        more_examples = _more_examples(reached, seeds, examples)
        more_seeds = smallest(
            lambda more: reached(seeds + more, examples) >= ENOUGH, most=MOST_SEEDS - seeds, within=WITHIN
        )
        if more_examples is None and more_seeds is None:
            both = _both(reached, seeds, examples)
    return Power(
        seeds=seeds,
        examples=examples,
        margin=margin,
        within=within,
        at_ten_times=reached(seeds, 10 * examples),
        decides=float(np.quantile(below, ENOUGH)),
        shows_worse=margin + float(np.quantile(above, ENOUGH)),
        more_examples=more_examples,
        more_seeds=more_seeds,
        both=both,
        spread=spread,
    )


def simulated(spread: Spread, seeds: int, examples: int, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Simulate DRAWS intervals of two equal methods with at least two seeds.

    The random numbers are the same in every call, so more seeds or examples never decide less by chance.

    Returns:
        Minus the lower ends and the upper ends (DRAWS,), in points.
    """
    rng = np.random.default_rng(0)
    rest = spread.rest**2
    rows = math.sqrt(spread.seeds**2 + rest / examples) * rng.standard_normal((DRAWS, seeds))  # (D, S)
    own = spread.examples**2 + rest / seeds  # variance of a column's mean
    added = 2 * (own / spread.apart) / examples  # by `evidence.with_pseudo_examples`
    columns = own * rng.chisquare(max(1, examples - 1), DRAWS) / max(1, examples - 1) + added  # (D,)
    middle = rows.mean(1) + math.sqrt(spread.examples**2 / examples) * rng.standard_normal(DRAWS)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds  # (R, S)
    noise = rng.permutation(_normal(RESAMPLES))  # (R,)
    drawn = math.sqrt(seeds / (seeds - 1)) * (rows @ weights.T - rows.mean(1, keepdims=True))
    drawn += np.sqrt(columns / examples)[:, None] * noise  # (D, R)
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2], axis=1)
    wider = _quantile(rows.var(1, ddof=1), columns, rest, seeds, examples, confidence)
    return -(middle + wider * low), middle + wider * high


def _quantile(rows: Floats, columns: Floats, rest: float, seeds: int, examples: int, confidence: float) -> Floats:
    """The width of the interval relative to a normal's, by the t quantile with Satterthwaite's degrees of freedom."""
    by_seeds = np.maximum(0.0, rows - rest / examples) / seeds + rest / (seeds * examples)
    by_examples = np.maximum(0.0, columns - rest / seeds) / examples + rest / (seeds * examples)
    below = by_seeds**2 / (seeds - 1) + by_examples**2 / max(1, examples - 1)
    freedom = np.maximum(1.0, (by_seeds + by_examples) ** 2 / np.maximum(below, 1e-300))
    level = 0.5 + confidence / 2
    wider: Floats = stdtrit(freedom, level) / NormalDist().inv_cdf(level)
    return wider


def _normal(count: int) -> Floats:
    normal = NormalDist()
    return np.array([normal.inv_cdf((place + 0.5) / count) for place in range(count)])


def _both(reached: Callable[[int, int], float], seeds: int, examples: int) -> tuple[int, int] | None:
    """(further seeds, further examples): the fewest examples with 2, 4 or 8 times the seeds."""
    for factor in (2, 4, 8):
        many = min(MOST_SEEDS, factor * seeds)
        more = _more_examples(reached, many, examples)
        if more is not None:
            return many - seeds, more
    return None


def _more_examples(reached: Callable[[int, int], float], seeds: int, examples: int) -> int | None:
    """The fewest further examples that are enough with so many seeds; None if none are.

    The search doubles them, because with two seeds many more examples can be worse again.
    """
    return smallest(lambda more: reached(seeds, examples + more) >= ENOUGH, most=MOST_EXAMPLES, within=WITHIN)


def _points(value: float) -> str:
    number = f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return f"{number} point{'' if number == '1' else 's'}"
