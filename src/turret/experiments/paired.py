"""Compare two versions on the same examples: the difference, and whether chance explains it.

Binary scores: McNemar's exact test. Other scores: sign flips of the paired differences, two-sided (both in
`turret.statistics`). The interval is the percentile bootstrap of the mean difference (Efron 1979). These tests need a
fixed sample: repeating them with more examples until they decide makes them wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from turret.json_types import JsonObject
from turret.statistics import Floats, sign_flips, sign_test

DRAWS, BATCH = 10_000, 500


@dataclass(frozen=True)
class Paired:
    """Version B against version A on the same examples."""

    examples: int
    a: float  # mean score
    b: float
    difference: float  # b - a
    low: float  # of the interval of the difference
    high: float
    level: float  # confidence level of the interval
    p: float
    test: str  # "McNemar" or "sign flip"
    only_a: int  # examples with a higher score of A
    only_b: int
    equal: int

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `undecided`, for B."""
        if self.p > 1 - self.level:
            return "undecided"
        return "better" if self.difference > 0 else "worse"

    def as_json(self) -> JsonObject:
        return {**asdict(self), "verdict": self.verdict}


def compare(a: Sequence[float], b: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Paired:
    """Compare two versions.

    Args:
        a: scores of the examples, (N,); more is better.
        b: scores of the same examples, (N,).
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    differences = second - first  # (N,)
    generator = np.random.default_rng(seed)
    low, high = np.quantile(_resampled(differences, generator), [(1 - level) / 2, (1 + level) / 2])
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    binary = bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
    p = sign_test(only_a, only_b) if binary else sign_flips(differences, generator, DRAWS)
    return Paired(
        examples=len(differences),
        a=float(first.mean()),
        b=float(second.mean()),
        difference=float(differences.mean()),
        low=float(low),
        high=float(high),
        level=level,
        p=p,
        test="McNemar" if binary else "sign flip",
        only_a=only_a,
        only_b=only_b,
        equal=len(differences) - only_a - only_b,
    )


def _resampled(differences: Floats, generator: np.random.Generator) -> Floats:
    """Means of samples of size N, drawn with replacement: (DRAWS,)."""
    n = len(differences)
    means = [differences[generator.integers(0, n, (BATCH, n))].mean(axis=1) for _ in range(DRAWS // BATCH)]
    return np.concatenate(means)
