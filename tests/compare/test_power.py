"""The power of a design before it runs, compared with simulations of the verdict itself."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from turret.compare.design import Spread, power, simulate_intervals
from turret.compare.verdict import judge

ASSUMED = Spread.assumed("classify")


def drawn(rng: np.random.Generator, spread: Spread, seeds: int, examples: int) -> np.ndarray:
    """Differences of two equal methods (S, N), with the spreads of `spread`."""
    by_seed = spread.seeds * rng.standard_normal((seeds, 1))
    by_example = spread.examples * rng.standard_normal((1, examples))
    return (by_seed + by_example + spread.rest * rng.standard_normal((seeds, examples))) / 100


def reached(repeats: int, spread: Spread, seeds: int, examples: int, margin: float) -> float:
    """How often the verdict itself says `within`."""
    rng = np.random.default_rng(5)
    said = [judge(drawn(rng, spread, seeds, examples), margin, rng, resamples=300).word for _ in range(repeats)]
    return said.count("within") / repeats


def test_few_examples_decide_little_and_ten_times_as_many_decide_more() -> None:
    found = power(ASSUMED, 5, 500, 1.0)
    assert found.within == pytest.approx(0.10, abs=0.04)
    assert found.at_ten_times == pytest.approx(0.42, abs=0.06)
    first, second, advice, _ = found.sentences()
    assert "5 seeds and 500 test examples show that they are within 1 point in " in first
    assert "5,000" in first
    assert "3.6 points" in second
    assert advice == "about 5 more seeds and 11,000 more test examples would decide within 1 point"


def test_more_seeds_more_examples_and_a_wider_margin_each_decide_more() -> None:
    """From three seeds on: with two seeds, the power depends too much on the variation between examples."""

    def within(seeds: int, examples: int, margin: float) -> float:
        return float((simulate_intervals(ASSUMED, seeds, examples)[0] <= margin).mean())

    for ordered in (
        [within(5, n, 1.0) for n in (100, 500, 2000, 8000)],
        [within(s, 5000, 1.0) for s in (3, 5, 10, 20)],
        [within(5, 500, m) for m in (0.5, 1, 2, 4)],
    ):
        assert all(a <= b for a, b in itertools.pairwise(ordered))


def test_what_it_asks_for_is_enough() -> None:
    asked = power(Spread(0.2, 20, 20, 0.2, "assumed"), 5, 500, 1.0)
    assert asked.more_examples
    assert power(asked.spread, 5, 500 + asked.more_examples, 1.0).within >= 0.78
    lucky = power(Spread(2.0, 2, 2, 0.2, "assumed"), 4, 5000, 1.5)
    assert lucky.more_seeds
    assert power(lucky.spread, 4 + lucky.more_seeds, 5000, 1.5).within >= 0.78
    neither = power(ASSUMED, 5, 500, 1.0)
    assert neither.both
    assert power(ASSUMED, 5 + neither.both[0], 500 + neither.both[1], 1.0).within >= 0.78


def test_it_is_told_in_less_than_a_second() -> None:
    began = time.process_time()
    power(ASSUMED, 5, 500, 1.0)
    assert time.process_time() - began < 1.0


def test_one_seed_decides_nothing() -> None:
    assert power(ASSUMED, 1, 500, 1.0).sentences() == ("one seed decides nothing; give at least two",)


def test_what_has_run_takes_the_place_of_what_was_assumed() -> None:
    rng = np.random.default_rng(3)
    spread = Spread(2.0, 10.0, 15.0, 1.0, "")
    found = Spread.measured([drawn(rng, spread, 8, 2000), drawn(rng, spread, 8, 2000)])
    assert found is not None
    assert found.seeds == pytest.approx(2.0, rel=0.4)
    assert found.examples == pytest.approx(10.0, rel=0.1)
    assert found.rest == pytest.approx(15.0, rel=0.1)
    assert found.source == "measured on the 8 seeds that have run"
    assert Spread.measured([drawn(rng, spread, 1, 100)]) is None


@pytest.mark.slow
def test_the_plan_is_about_the_verdict_itself() -> None:
    told = power(ASSUMED, 5, 500, 2.5).within
    assert reached(60, ASSUMED, 5, 500, 2.5) == pytest.approx(told, abs=0.2)
    assert 0.2 < told < 0.8  # the control: a rate that could be off to both sides


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "examples", "margin"), [(2, 1000, 4), (3, 500, 3), (5, 500, 1), (5, 2000, 1.5)])
def test_the_plan_is_about_the_verdict_itself_over_designs(seeds: int, examples: int, margin: float) -> None:
    told = power(ASSUMED, seeds, examples, margin).within
    assert reached(300, ASSUMED, seeds, examples, margin) == pytest.approx(told, abs=0.09)
