"""Evidence that a share of answers (errors, or slow answers) exceeds a bound. Exact, and valid at any time.

For s bad answers of n and the null hypothesis that each is bad with probability at most b: a mixture of likelihood
ratios over shares above b, with the prior Beta(1/2, 1/2) truncated at b.

    E = B(s + 1/2, f + 1/2) (1 - I_b(s + 1/2, f + 1/2)) / ( B(1/2, 1/2) (1 - I_b(1/2, 1/2)) b^s (1 - b)^f )    f = n - s

I is the regularised incomplete beta function. Under the null, P(E ever reaches 1/alpha) <= alpha.

Source: Robbins, "Statistical methods related to the law of the iterated logarithm", 1970.
"""

from __future__ import annotations

import math

from scipy.special import betainc, betaln


def evidence(bad: int, total: int, bound: float) -> float:
    """Log evidence that a share of more than `bound` of the answers is bad."""
    s, f = bad + 0.5, total - bad + 0.5
    above = betainc(f, s, 1 - bound)  # 1 - I_b(s, f), accurate if it is small
    if above <= 0:
        return -math.inf
    marginal = betaln(s, f) + math.log(above) - betaln(0.5, 0.5) - math.log(betainc(0.5, 0.5, 1 - bound))
    return float(marginal - bad * math.log(bound) - (total - bad) * math.log1p(-bound))
