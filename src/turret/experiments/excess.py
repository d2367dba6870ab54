"""Evidence that one arm fails more than another at the same time. A cause that hits both arms is no evidence.

Answers come in blocks of one time. In a block the arms have n1 and n0 answers, of which s1 and s0 are bad; s = s1 + s0.
If both arms fail alike, s1 is hypergeometric given n1, n0 and s, whatever the rate of the block. If an answer of the
first arm has omega times the odds to fail, s1 has Fisher's noncentral hypergeometric distribution (Fisher 1935). The
ratio of the two is

    E = mean over omega of  prod over blocks  omega^s1 / sum_u P(U = u) omega^u        U: hypergeometric(n1, n0, s)

Each factor has expectation 1 if the odds are equal, and less if the first arm fails less. So E is an e-process, and the
rate may drift from block to block.
"""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln, logsumexp

from turret.experiments.e_process import Floats

ODDS = np.array([1.5, 2.0, 4.0, 8.0, 16.0, 64.0])


def factors(bad: int, total: int, control_bad: int, control_total: int) -> Floats:
    """The log factors of one block, for each odds ratio: (len(ODDS),)."""
    s = bad + control_bad
    least, most = max(0, s - control_total), min(s, total)
    if least == most:  # all or none are bad, or one arm has no answers
        return np.zeros(len(ODDS))
    u = np.arange(least, most + 1, dtype=np.float64)
    chances = _log_choose(total, u) + _log_choose(control_total, s - u) - _log_choose(total + control_total, s)
    grown = logsumexp(chances[:, None] + u[:, None] * np.log(ODDS), axis=0)
    return np.asarray(bad * np.log(ODDS) - grown)


def _log_choose(n: int, k: Floats | int) -> Floats:
    return np.asarray(gammaln(n + 1) - gammaln(np.asarray(k) + 1) - gammaln(n - np.asarray(k) + 1))
