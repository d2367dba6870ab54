"""Did the arms get the units that they were to get? Counts in, evidence out; a mismatch makes every comparison void.

Under the split as planned, a unit of revision r is in arm a with probability pi[r, a]. Against it stands a mixture of
splits, a Dirichlet with mean pi[r] for each revision, so that the evidence is a ratio of likelihoods in closed form
(Lindon & Malek, "Anytime-valid inference for multinomial count data", 2022):

    E = mean over k of  prod over r of  B(k pi + n) / B(k pi) / prod_a pi_a^n_a         B: multivariate beta

n: the units counted so far. It is a martingale where the split is as planned, so it may be looked at any time: the
chance that it ever reaches 1/level is at most the level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from scipy.special import gammaln

LEVEL = 0.001  # how rarely a split that is as planned may be called wrong
CONCENTRATIONS = (10.0, 100.0, 1000.0, 10000.0)

Split = tuple[Mapping[str, float], Mapping[str, int]]  # of one revision: probability of each arm, units of each arm


def evidence(splits: Iterable[Split]) -> float:
    """The logarithm of the evidence that units did not fall as planned; infinite where one without traffic got some."""
    logs = np.zeros(len(CONCENTRATIONS))
    for planned, seen in splits:
        if any(count and planned.get(arm, 0.0) <= 0 for arm, count in seen.items()):
            return math.inf
        arms = [arm for arm, probability in planned.items() if probability > 0]
        pi = np.array([planned[arm] for arm in arms])
        n = np.array([seen.get(arm, 0) for arm in arms], dtype=np.float64)
        for place, k in enumerate(CONCENTRATIONS):
            grown = gammaln(k * pi + n) - gammaln(k * pi)
            logs[place] += grown.sum() + gammaln(k) - gammaln(k + n.sum()) - (n * np.log(pi)).sum()
    most = float(logs.max())
    return most + math.log(float(np.exp(logs - most).mean()))
