"""An e-process: a mean of products, each of which starts at 1 and expects not to grow under the null hypothesis.

By Ville's inequality the chance that it ever reaches 1/alpha under its null is at most alpha. So one may look after
every step, and `peak` says the same whoever looked when.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EProcess:
    """The products as logarithms, and the highest that their mean was."""

    logs: tuple[float, ...]
    peak: float = 0.0  # the highest logarithm of the mean

    @classmethod
    def of(cls, products: int) -> EProcess:
        """At its start."""
        return cls((0.0,) * products)

    @property
    def now(self) -> float:
        """The logarithm of the mean."""
        return float(log_mean(np.array([self.logs]))[0])

    def through(self, factors: Floats) -> EProcess:
        """After these steps. factors: logarithms, (N, products)."""
        if not len(factors):
            return self
        path = self.path(factors)
        return EProcess(tuple(path[-1].tolist()), max(self.peak, float(log_mean(path).max())))

    def first(self, factors: Floats, level: float) -> int:
        """The step after which the mean is at least e^level; the number of steps where it never is."""
        reached = log_mean(self.path(factors)) >= level if level < math.inf else np.zeros(len(factors), dtype=bool)
        return int(np.argmax(reached)) if reached.any() else len(factors)

    def path(self, factors: Floats) -> Floats:
        """The logarithms of the products after each step: (N, products)."""
        return np.asarray(np.cumsum(factors, axis=0) + np.array(self.logs))


def log_mean(logs: Floats) -> Any:
    """log(mean(exp(logs))) of each row: (N, products) -> (N,)."""
    most = logs.max(axis=1)
    return most + np.log(np.exp(logs - most[:, None]).mean(axis=1))


def capped(log: float) -> float:
    """An e-value that JSON can hold."""
    return math.exp(min(log, 690.0))
