"""Does a share exceed its bound? Of answers that are errors, or slow. Counts in, evidence out; exact, at any moment.

For s of n answers and the null `each is bad with a chance of at most b`, a mixture of likelihood ratios over the shares
above b, with a Beta(1/2, 1/2) that is cut off at b (Robbins, "Statistical methods related to the law of the iterated
logarithm", 1970):

    E = B(s + 1/2, f + 1/2) (1 - I_b(s + 1/2, f + 1/2)) / ( B(1/2, 1/2) (1 - I_b(1/2, 1/2)) b^s (1 - b)^f )    f = n - s

I: the regularised incomplete beta function. The chance that it ever reaches 1/alpha under the null is at most alpha.
"""

from __future__ import annotations

import math

from scipy.special import betainc, betaln


def evidence(bad: int, total: int, bound: float) -> float:
    """The logarithm of the evidence that more than `bound` of the answers are bad."""
    s, f = bad + 0.5, total - bad + 0.5
    above = betainc(f, s, 1 - bound)  # 1 - I_b(s, f), without losing what is small
    if above <= 0:
        return -math.inf
    likely = betaln(s, f) + math.log(above) - betaln(0.5, 0.5) - math.log(betainc(0.5, 0.5, 1 - bound))
    return float(likely - bad * math.log(bound) - (total - bad) * math.log1p(-bound))
