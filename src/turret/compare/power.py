"""What a design can decide, told before anything is trained: how often `judge` would say `within` of equal methods.

The verdict's own interval is simulated on d: (S, N), the difference of two methods' scores, with the variances that
`evidence.Components` names. They are measured where earlier trainings are there, and assumed otherwise. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.special import stdtrit

from turret.compare import report_text
from turret.compare.evidence import Array, components
from turret.tasks import task_of

DRAWS, RESAMPLES = 1000, 300
ENOUGH = 0.8  # of designs like this one reach a verdict: the usual power
MOST_SEEDS = 50
MOST_EXAMPLES = 200_000


@dataclass(frozen=True)
class Spread:
    """How much the difference of two methods varies, as standard deviations in points."""

    seeds: float  # from training to training, beyond what the test examples explain
    examples: float  # from example to example, in all trainings alike
    rest: float  # what neither explains
    apart: float  # share of the examples on which some pair of trainings differs at all
    source: str  # how it is known

    @classmethod
    def assumed(cls, kind: str) -> Spread:
        """Before anything has run. kind: of the task."""
        if task_of(kind).right_or_wrong:
            said = "assumed: 0.8 points of luck a seed, 1 example in 10 right for one method only"
            return cls(0.8, 100 * math.sqrt(0.06), 100 * math.sqrt(0.04), 0.2, said)
        return cls(0.8, 8.0, 12.0, 1.0, "assumed: 0.8 points of luck a seed, 14 points an example")

    @classmethod
    def measured(cls, differences: Sequence[Array]) -> Spread | None:
        """From the differences (S, N) of pairs of rows that have run, None where no pair has two seeds."""
        usable = [d for d in differences if d.shape[0] > 1 and d.shape[1] > 1]
        if not usable:
            return None
        found = [components(100 * d) for d in usable]
        mean = [math.sqrt(float(np.mean([getattr(each, part) for each in found]))) for part in _PARTS]
        apart = float(np.mean([(d != 0).any(0).mean() for d in usable]))
        seeds = max(d.shape[0] for d in usable)
        said = f"measured on the {seeds} seeds that have run"
        return cls(mean[0], mean[1], mean[2], max(apart, 0.01), said)


_PARTS = ("between_seeds", "between_examples", "rest")


@dataclass(frozen=True)
class Power:
    """What one design can decide."""

    seeds: int
    examples: int
    margin: float
    within: float  # how often equal methods would be called as good
    at_ten_times: float  # the same with ten times the test examples
    decides: float | None  # points: the margin within which 8 of 10 equal methods would be called as good
    shows_worse: float | None  # points: a method that is truly so far behind would be called worse in 8 of 10 cases
    more_examples: int | None  # test examples that would make it 8 of 10, with these seeds
    more_seeds: int | None  # seeds that would, with these examples
    both: tuple[int, int] | None  # (more seeds, more examples) where neither alone would
    spread: Spread

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "sentences": list(self.sentences())}

    def sentences(self) -> tuple[str, ...]:
        """For people: what is decided, what would decide, and what was assumed."""
        if self.decides is None or self.shows_worse is None:
            return ("one seed decides nothing; give at least two",)
        more = report_text.rounded(10 * self.examples)
        first = (
            f"of equal methods {report_text.share(self.within)} would be called as good within {_points(self.margin)} "
            f"with {self.seeds} seeds and {self.examples:,} test examples, "
            f"{report_text.share(self.at_ten_times)} with {more}"
        )
        second = (
            f"it decides in 8 of 10 cases: equal methods as good within {_points(self.decides)}, and a method that is "
            f"{_points(self.shows_worse)} behind as worse"
        )
        return (first, second, self.advice(), f"spread of the differences {self.spread.source}")

    def advice(self) -> str:
        """What would decide within the margin."""
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
    """What `seeds` trainings a method on `examples` test examples can decide about a margin in points."""

    def reached(some: int, many: int) -> float:
        return float((simulated(spread, some, many, confidence)[0] <= margin).mean()) if some > 1 else 0.0

    if seeds < 2:
        return Power(seeds, examples, margin, 0.0, 0.0, None, None, None, None, None, spread)
    below, above = simulated(spread, seeds, examples, confidence)
    now = float((below <= margin).mean())
    alone = both = more = None
    if now < ENOUGH:
        alone = _fewest(_enough(reached, seeds, examples), MOST_EXAMPLES)
        more = _fewest(lambda s: reached(seeds + s, examples) >= ENOUGH, MOST_SEEDS - seeds)
        if alone is None and more is None:
            both = _both(reached, seeds, examples)
    return Power(
        seeds=seeds,
        examples=examples,
        margin=margin,
        within=now,
        at_ten_times=reached(seeds, 10 * examples),
        decides=float(np.quantile(below, ENOUGH)),
        shows_worse=margin + float(np.quantile(above, ENOUGH)),
        more_examples=alone,
        more_seeds=more,
        both=both,
        spread=spread,
    )


def simulated(spread: Spread, seeds: int, examples: int, confidence: float = 0.95) -> tuple[Array, Array]:
    """(minus the lower end, the upper end) of DRAWS intervals in points, of methods that are equal. At least 2 seeds.

    The same draws every time, so that more seeds or examples never seem to decide less by chance.
    """
    rng = np.random.default_rng(0)
    rest = spread.rest**2
    rows = math.sqrt(spread.seeds**2 + rest / examples) * rng.standard_normal((DRAWS, seeds))  # (D, S)
    own = spread.examples**2 + rest / seeds  # of a column's mean
    added = 2 * (own / spread.apart) / examples  # by `with_one_more_each_way`
    columns = own * rng.chisquare(max(1, examples - 1), DRAWS) / max(1, examples - 1) + added  # (D,)
    middle = rows.mean(1) + math.sqrt(spread.examples**2 / examples) * rng.standard_normal(DRAWS)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds  # (R, S)
    noise = rng.permutation(_normal(RESAMPLES))  # (R,)
    drawn = math.sqrt(seeds / (seeds - 1)) * (rows @ weights.T - rows.mean(1, keepdims=True))
    drawn += np.sqrt(columns / examples)[:, None] * noise  # (D, R)
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2], axis=1)
    wider = _quantile(rows.var(1, ddof=1), columns, rest, seeds, examples, confidence)
    return -(middle + wider * low), middle + wider * high


def _quantile(rows: Array, columns: Array, rest: float, seeds: int, examples: int, confidence: float) -> Array:
    """How much wider than a normal's the interval is: by the t of Satterthwaite's degrees, as in `evidence`."""
    by_seeds = np.maximum(0.0, rows - rest / examples) / seeds + rest / (seeds * examples)
    by_examples = np.maximum(0.0, columns - rest / seeds) / examples + rest / (seeds * examples)
    below = by_seeds**2 / (seeds - 1) + by_examples**2 / max(1, examples - 1)
    freedom = np.maximum(1.0, (by_seeds + by_examples) ** 2 / np.maximum(below, 1e-300))
    level = 0.5 + confidence / 2
    wider: Array = stdtrit(freedom, level) / NormalDist().inv_cdf(level)
    return wider


def _normal(count: int) -> Array:
    normal = NormalDist()
    return np.array([normal.inv_cdf((place + 0.5) / count) for place in range(count)])


def _fewest(enough: Callable[[int], bool], most: int) -> int | None:
    """The least number up to `most` that is enough, within 5%; None where none is."""
    low, high = 0, 1
    while high <= most and not enough(high):  # upward: with two seeds, far more examples can be enough no longer
        low, high = high, 2 * high
    if high > most:
        return None
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _both(reached: Callable[[int, int], float], seeds: int, examples: int) -> tuple[int, int] | None:
    """(more seeds, more examples): with twice the seeds, then four times, the fewest examples that are enough."""
    for factor in (2, 4, 8):
        many = min(MOST_SEEDS, factor * seeds)
        found = _fewest(_enough(reached, many, examples), MOST_EXAMPLES)
        if found is not None:
            return many - seeds, found
    return None


def _enough(reached: Callable[[int, int], float], seeds: int, examples: int) -> Callable[[int], bool]:
    return lambda more: reached(seeds, examples + more) >= ENOUGH


def _points(value: float) -> str:
    said = f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return f"{said} point{'' if said == '1' else 's'}"
