"""Which of many experiments found something, so that few of those named are false. Numbers in, a set out.

e-BH (Wang & Ramdas, "False discovery rate control with e-values", 2022): of K e-values, name the k largest, for the
largest k with  e_(k) >= K / (k alpha).  The expected share of false ones among the named is at most alpha, however the
experiments depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def named(evidence: Mapping[str, float], alpha: float) -> frozenset[str]:
    """evidence: the logarithm of each experiment's e-value, as it is now and not at its peak."""
    order = sorted(evidence, key=lambda name: -evidence[name])
    best = 0
    for k, name in enumerate(order, start=1):
        if evidence[name] >= math.log(len(order) / (k * alpha)):
            best = k
    return frozenset(order[:best])
