"""What comparisons and experiments share: exact tests of paired scores, searches for a size, and e-processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

Floats = NDArray[np.float64]

# --- paired scores ----------------------------------------------------------------------------------------------------


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p of so many wins and losses if both are equally likely; without any it is 1.

    With wins and losses of two classifiers on the same examples this is McNemar's exact test (McNemar 1947):

        p = min(1, 2 P(X <= min(wins, losses))),   X ~ Binomial(wins + losses, 1/2)
    """
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def sign_flips(differences: Floats, generator: np.random.Generator, resamples: int) -> float:
    """The two-sided p of a zero mean, by flipping the signs of the differences at random.

    Args:
        differences: of two scores on the same examples, (N,).
        generator: draws the signs.
        resamples: number of draws.
    """
    observed = abs(float(differences.sum()))
    if not observed:
        return 1.0
    extreme = 0
    for start in range(0, resamples, 500):  # (500, N) at a time
        signs = generator.integers(0, 2, size=(min(500, resamples - start), len(differences))) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed - 1e-12).sum())
    return (extreme + 1) / (resamples + 1)  # with the sample itself


# --- sizes of samples -------------------------------------------------------------------------------------------------


def smallest(
    enough: Callable[[int], bool], low: int = 0, high: int = 1, *, most: float = math.inf, within: float = 0.0
) -> int | None:
    """The smallest number above `low` that is enough, by doubling and halving; None if none up to `most` is found.

    Args:
        high: the first number that is tried.
        within: the share of the number by which it may be too large.
    """
    if high > most:
        return None
    while not enough(high):
        if high >= most:
            return None
        low, high = high, int(min(2 * high, most))
    while high - low > max(1, high * within):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# --- e-processes ------------------------------------------------------------------------------------------------------
# An e-process: a mean of products, each of which starts at 1 and is not expected to grow under the null hypothesis.
#
# By Ville's inequality, under the null P(the mean ever reaches 1/alpha) <= alpha. So it may be looked at after each
# step, and `peak` does not depend on when that was done.


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


def capped_e_value(log: float) -> float:
    """The e-value of a logarithm, limited to what JSON can hold."""
    return math.exp(min(log, 690.0))
