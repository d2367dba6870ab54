"""An e-process: a mean of products, each of which starts at 1 and is not expected to grow under the null hypothesis.

By Ville's inequality, under the null P(the mean ever reaches 1/alpha) <= alpha. So it may be looked at after each step,
and `peak` does not depend on when that was done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EProcess:
    """The logarithms of the products, and the highest mean so far."""

    logs: tuple[float, ...]
    peak: float = 0.0  # log of the highest mean so far

    @classmethod
    def of(cls, products: int) -> EProcess:
        """An e-process before its first step."""
        return cls((0.0,) * products)

    @property
    def now(self) -> float:
        """The log of the mean."""
        return float(log_mean(np.array([self.logs]))[0])

    def through(self, factors: Floats) -> EProcess:
        """The process after more steps.

        Args:
            factors: logarithms, (N, products).
        """
        if not len(factors):
            return self
        path = self.path(factors)
        return EProcess(tuple(path[-1].tolist()), max(self.peak, float(np.max(log_mean(path)))))

    def first(self, factors: Floats, level: float) -> int:
        """The first step after which the mean is at least e^level; N if there is none."""
        reached = log_mean(self.path(factors)) >= level
        return int(np.argmax(reached)) if reached.any() else len(factors)

    def path(self, factors: Floats) -> Floats:
        """Logarithms of the products after each step: (N, products)."""
        return np.asarray(np.cumsum(factors, axis=0) + np.array(self.logs))


def log_mean(logs: Floats) -> Floats:
    """log(mean(exp(logs))) of each row: (N, products) -> (N,)."""
    most = logs.max(axis=1)
    return np.asarray(most + np.log(np.exp(logs - most[:, None]).mean(axis=1)))


def capped(log: float) -> float:
    """The e-value of a logarithm, limited to what JSON can hold."""
    return math.exp(min(log, 690.0))
