"""Did each arm get its share of what was counted? The test for a sample ratio mismatch, a unit at a time.

Under the null a unit of stratum r is in arm a with probability pi[r, a], whatever came before. Against it stands a
mixture of shares, a Dirichlet with mean pi[r] and concentration k for each stratum. Its ratio of likelihoods is a
product with one factor a unit (Lindon & Malek, "Anytime-valid inference for multinomial count data", 2022):

    E_n = mean over k of  prod_i  (k pi_a + n_a) / ((k + n) pi_a)      n, n_a: units of the stratum before, in arm a

The strata may be any classes that the arm has no effect on: revisions of the split, or how long an outcome took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from turret.experiments.e_process import EProcess, Floats

CONCENTRATIONS = np.array([10.0, 100.0, 1000.0, 10000.0])
CERTAIN = 1000.0  # the logarithm of a factor: a unit in an arm that gets none

Stratum = tuple[int, int]  # revision of the split, class
Planned = Mapping[int, Mapping[str, float]]  # revision -> arm -> probability


@dataclass(frozen=True)
class SampleRatio:
    """What was counted so far, and the evidence that it did not fall as planned."""

    counts: Mapping[Stratum, Mapping[str, int]] = field(default_factory=dict)
    process: EProcess = field(default_factory=lambda: EProcess.of(len(CONCENTRATIONS)))

    def after(self, seen: Sequence[tuple[Stratum, str]], planned: Planned) -> SampleRatio:
        """With more units, in their order. seen: the stratum and the arm of each."""
        places: dict[Stratum, list[int]] = {}
        for place, (stratum, _) in enumerate(seen):
            places.setdefault(stratum, []).append(place)
        factors = np.zeros((len(seen), len(CONCENTRATIONS)))
        counts = dict(self.counts)
        for stratum, here in places.items():
            arms = [seen[place][1] for place in here]
            factors[here], counts[stratum] = _factors(arms, planned[stratum[0]], counts.get(stratum, {}))
        return SampleRatio(counts, self.process.through(factors))


def _factors(
    arms: Sequence[str], planned: Mapping[str, float], before: Mapping[str, int]
) -> tuple[Floats, Mapping[str, int]]:
    """Of units of one stratum: logarithms of factors, (N, concentrations), and the counts after them."""
    names = sorted({*planned, *arms})
    which = np.array([names.index(arm) for arm in arms])
    share = np.array([planned.get(name, 0.0) for name in names])[which]
    one = (which[:, None] == np.arange(len(names))).astype(np.float64)  # (N, arms)
    start = np.array([before.get(name, 0) for name in names], dtype=np.float64)
    seen = np.cumsum(one, axis=0) - one + start  # before each unit
    mine, total, pi = seen[np.arange(len(arms)), which][:, None], seen.sum(axis=1)[:, None], share[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.log((CONCENTRATIONS * pi + mine) / ((CONCENTRATIONS + total) * pi))
    after = start + one.sum(axis=0)
    return np.where(pi > 0, factors, CERTAIN), {name: int(n) for name, n in zip(names, after, strict=True) if n}
