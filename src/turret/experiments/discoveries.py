"""Which of many experiments are discoveries, with a bound on the false discovery rate (e-BH).

Of K e-values e_(1) >= e_(2) >= ..., name the k largest, for the largest k with e_(k) >= K / (k alpha). The expected
share of false discoveries is at most alpha, however the experiments depend on each other.

A verdict at 1 / alpha is rarely a discovery among many experiments: of 20 with 4 real differences, each of these needs
20 / (4 alpha). So an experiment that ends automatically continues until it reaches `needed`.

Source: Wang & Ramdas, "False discovery rate control with e-values", 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def named(evidence: Mapping[str, float], alpha: float) -> frozenset[str]:
    """The names of the discoveries.

    Args:
        evidence: the log e-value of each experiment, as it is now and not at its peak.
    """
    order = sorted(evidence, key=lambda name: -evidence[name])
    best = 0
    for k, name in enumerate(order, start=1):
        if evidence[name] >= math.log(len(order) / (k * alpha)):
            best = k
    return frozenset(order[:best])


def needed(others: Sequence[float], alpha: float) -> float:
    """The log e-value with which one more experiment would be a discovery, besides these."""
    experiments = len(others) + 1
    order = sorted(others, reverse=True)
    levels = (math.log(experiments / (k * alpha)) for k in range(experiments, 0, -1))
    return next(
        level for k, level in zip(range(experiments, 0, -1), levels, strict=True) if k == 1 or order[k - 2] >= level
    )
