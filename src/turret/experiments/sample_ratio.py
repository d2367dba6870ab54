"""A sequential test for sample ratio mismatch: whether each arm gets its planned share of the units.

Under the null, a unit of stratum r is in arm a with probability pi[r, a], whatever came before. The alternative is a
mixture of shares: for each stratum a Dirichlet with mean pi[r] and concentration k. The likelihood ratio has one factor
per unit:

    E_n = mean over k of  prod_i  (k pi_a + n_a) / ((k + n) pi_a)      n, n_a: earlier units of the stratum, in arm a

Strata may be any classes on which the arm has no effect: revisions of the split, or how late an outcome came.

Source: Lindon & Malek, "Anytime-valid inference for multinomial count data", 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from turret.experiments.e_process import EProcess, Floats

CONCENTRATIONS = np.array([10.0, 100.0, 1000.0, 10000.0])
CERTAIN = 1000.0  # log factor of a unit in an arm that gets no traffic

Stratum = tuple[int, int]  # revision of the split, class
Planned = Mapping[int, Mapping[str, float]]  # revision -> arm -> probability


@dataclass(frozen=True)
class SampleRatio:
    """The counts so far, and the evidence that they differ from the plan. Immutable; see `after`."""

    counts: Mapping[Stratum, Mapping[str, int]] = field(default_factory=dict)
    process: EProcess = field(default_factory=lambda: EProcess.of(len(CONCENTRATIONS)))

    def after(self, seen: Sequence[tuple[Stratum, str]], planned: Planned) -> SampleRatio:
        """The counts and evidence with more units.

        Args:
            seen: stratum and arm of each unit, in order.
        """
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
    """Log factors of units of one stratum, (N, concentrations), and the counts after them."""
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
