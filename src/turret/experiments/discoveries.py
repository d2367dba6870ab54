"""Which of many experiments found something, so that few of those named are false. Numbers in, a set out.

e-BH (Wang & Ramdas, "False discovery rate control with e-values", 2022): of K e-values, name the k largest, for the
largest k with  e_(k) >= K / (k alpha).  The expected share of false ones among the named is at most alpha, however the
experiments depend on each other.

An experiment that ended at 1 / alpha, which decides for it alone, is seldom named among many: of 20 experiments with 4
real differences that takes 20 / (4 alpha). So an experiment that ends by itself goes on until `needed` is reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def named(evidence: Mapping[str, float], alpha: float) -> frozenset[str]:
    """evidence: the logarithm of each experiment's e-value, as it is now and not at its peak."""
    order = sorted(evidence, key=lambda name: -evidence[name])
    best = 0
    for k, name in enumerate(order, start=1):
        if evidence[name] >= math.log(len(order) / (k * alpha)):
            best = k
    return frozenset(order[:best])


def needed(others: Sequence[float], alpha: float) -> float:
    """The logarithm of the e-value with which one more experiment would be named beside these."""
    experiments = len(others) + 1
    order = sorted(others, reverse=True)
    levels = (math.log(experiments / (k * alpha)) for k in range(experiments, 0, -1))
    return next(
        level for k, level in zip(range(experiments, 0, -1), levels, strict=True) if k == 1 or order[k - 2] >= level
    )
