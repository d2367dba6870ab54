"""Sample ratio, bounds on errors and latency, discoveries over many, paired comparisons."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from turret.experiments import bounds, discoveries, paired, ratio

HALF = {"control": 0.5, "candidate": 0.5}


def test_units_that_fall_as_planned_raise_no_alarm_at_any_look_through_a_ramp() -> None:
    generator, alarms, runs = np.random.default_rng(0), 0, 200
    for _ in range(runs):
        seen = {share: {"control": 0, "candidate": 0} for share in (0.05, 0.5)}
        peak = 0.0
        for share in seen:
            for _ in range(10):
                candidate = int(generator.binomial(100, share))
                seen[share]["candidate"] += candidate
                seen[share]["control"] += 100 - candidate
                splits = [({"control": 1 - share, "candidate": share}, counts) for share, counts in seen.items()]
                peak = max(peak, ratio.evidence(splits))
        alarms += peak >= math.log(1 / 0.05)
    assert alarms <= stats.binom.ppf(0.999, runs, 0.05)


def test_units_that_are_missing_from_an_arm_are_noticed_and_a_ramp_is_not_taken_for_it() -> None:
    assert ratio.evidence([(HALF, {"control": 5000, "candidate": 4500})]) > math.log(1 / ratio.LEVEL)
    ramped = [
        ({"control": 0.95, "candidate": 0.05}, {"control": 9500, "candidate": 500}),
        (HALF, {"control": 500, "candidate": 500}),
    ]
    assert ratio.evidence(ramped) < 0
    pooled = {"control": 10000, "candidate": 1000}
    assert ratio.evidence([(HALF, pooled)]) > 100


def test_a_unit_in_an_arm_without_traffic_is_a_mismatch_at_once() -> None:
    assert ratio.evidence([({"control": 1.0}, {"control": 10, "candidate": 1})]) == math.inf


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.9), (0.2, 0.3, 0.5)])
def test_summed_over_all_splits_of_six_units_the_ratio_expects_one(shares) -> None:
    names = ("a", "b", "c")[: len(shares)]
    planned, expected = dict(zip(names, shares, strict=True)), 0.0
    for fell in itertools.product(names, repeat=6):
        chance = math.prod(planned[name] for name in fell)
        expected += chance * math.exp(ratio.evidence([(planned, {name: fell.count(name) for name in names})]))
    assert expected == pytest.approx(1)


@pytest.mark.parametrize("share", [0.02, 0.01, 0.1])
def test_a_share_at_its_bound_or_under_it_hardly_ever_raises_an_alarm_and_one_above_does(share) -> None:
    generator, runs, alarms = np.random.default_rng(1), 200, 0
    for _ in range(runs):
        bad = np.cumsum(generator.random(600) < share)
        alarms += any(bounds.evidence(int(bad[n]), n + 1, 0.02) >= math.log(20) for n in range(0, 600, 10))
    assert alarms <= stats.binom.ppf(0.999, runs, 0.05) if share <= 0.02 else alarms > 0.99 * runs


def test_the_bound_is_the_mixture_that_it_says() -> None:
    """By numerical integration; and summed over all sequences at the bound it expects one."""
    grid = np.linspace(0.1, 1, 400_001)[1:-1]
    prior = stats.beta(0.5, 0.5).pdf(grid)
    likely = (grid / 0.1) ** 3 * ((1 - grid) / 0.9) ** 5
    assert bounds.evidence(3, 8, 0.1) == pytest.approx(math.log((prior * likely).sum() / prior.sum()), abs=2e-2)
    expected = sum(stats.binom.pmf(s, 12, 0.1) * math.exp(bounds.evidence(s, 12, 0.1)) for s in range(13))
    assert expected == pytest.approx(1)
    assert bounds.evidence(0, 10_000_000, 0.02) == -math.inf  # none at all, and no crash
    assert bounds.evidence(1_000_000, 1_000_000, 0.02) > 1e6


def test_of_many_experiments_the_largest_are_named() -> None:
    e = {"a": math.log(400), "b": math.log(60), "c": math.log(15), "d": 0.0}
    assert discoveries.named(e, 0.05) == {"a", "b"}  # 80 for one, 40 for two, 27 for three
    assert discoveries.named({"only": math.log(19)}, 0.05) == frozenset()
    assert discoveries.named({}, 0.05) == frozenset()


def false_discoveries(expected: float, alpha: float = 0.1) -> float:
    """The mean share of false ones among the named, with 5 true effects among 25 experiments.

    expected: of a null e-value, at most 1 where it is valid. It is 0, or just enough to be named beside the true ones:
    no valid null is named more often.
    """
    generator, runs, null, true = np.random.default_rng(0), 2000, 20, 5
    enough = (null + true) / ((true + 1) * alpha)
    named_falsely = []
    for _ in range(runs):
        reached = generator.random(null) < expected / enough
        evidence = {f"null{n}": math.log(enough) + 1e-9 if high else -math.inf for n, high in enumerate(reached)}
        found = discoveries.named(evidence | {f"true{n}": 12.0 for n in range(true)}, alpha)
        assert len(found) == true + reached.sum()
        named_falsely.append(reached.sum() / len(found))
    return float(np.mean(named_falsely))


def test_few_of_the_named_are_false_as_long_as_null_evidence_is_worth_at_most_one() -> None:
    assert 0.04 < false_discoveries(1.0) <= 0.1
    assert false_discoveries(2.0) > 0.1  # evidence that reaches its bound too often is seen


def test_right_and_wrong_are_compared_by_mcnemar_and_texts_by_sign_flips() -> None:
    a, b = [1.0] * 40 + [0.0] * 20 + [1.0] * 4, [1.0] * 40 + [1.0] * 20 + [0.0] * 4
    found = paired.compare(a, b)
    assert (found.only_a, found.only_b, found.equal, found.test) == (4, 20, 40, "McNemar")
    assert found.p == pytest.approx(stats.binomtest(4, 24).pvalue)
    assert found.verdict == "better"
    assert found.difference == pytest.approx(16 / 64)
    assert found.low < found.difference < found.high
    generator = np.random.default_rng(0)
    base = generator.random(60) * 0.9
    assert paired.compare(base, base + 0.05 + 0.01 * generator.normal(size=60)).verdict == "better"
    assert paired.compare(base, base).verdict == "undecided"
    assert paired.compare(b, a).verdict == "worse"


def test_two_versions_that_are_equally_good_are_told_apart_hardly_ever() -> None:
    generator, runs = np.random.default_rng(0), 200
    wrong = 0
    for _ in range(runs):
        wrong += (
            paired.mcnemar(*(int(count) for count in np.bincount(generator.integers(0, 2, 60), minlength=2))) < 0.05
        )
    assert wrong <= stats.binom.ppf(0.999, runs, 0.05)
