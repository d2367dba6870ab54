"""Evidence that is looked at after every outcome is rarely wrong, and finds true differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, norm

from turret.experiments.evidence import BETS, SHIFTS, OutcomeTally

ALPHA = 0.05


def traffic(seed: int, n: int, control: Any, candidate: Any, ramp: tuple[float, ...] = (0.5,)) -> Any:
    """Arms, binary outcomes and probabilities of n units, with drifting means, while weights ramp."""
    generator = np.random.default_rng(seed)
    share = np.repeat(np.array(ramp), -(-n // len(ramp)))[:n]
    arm = (generator.random(n) < share).astype(np.int64)
    y = (generator.random(n) < np.where(arm == 1, candidate, control)).astype(np.float64)
    return arm, y, share


def tally(data: Any, *, binary: bool = True, margin: float | None = None) -> OutcomeTally:
    return OutcomeTally.empty(binary=binary, margin=margin).after(*data)


def decided(found: OutcomeTally) -> bool:
    """Whether a look after every outcome ever shows a verdict."""
    return max(found.better.peak, found.worse.peak) >= math.log(2 / ALPHA)


def most(runs: int, level: float = ALPHA) -> int:
    """The number of false alarms that a valid level rarely exceeds."""
    return int(binom.ppf(0.999, runs, level))


def peeked_z(data: Any, every: int = 50) -> bool:
    """The control: the textbook test of two proportions, with regular looks."""
    arm, y, _ = data
    for n in range(100, len(y) + 1, every):
        a, b = y[:n][arm[:n] == 0], y[:n][arm[:n] == 1]
        pooled = y[:n].mean()
        error = math.sqrt(pooled * (1 - pooled) * (1 / max(len(a), 1) + 1 / max(len(b), 1)))
        if len(a) and len(b) and error > 0 and abs(b.mean() - a.mean()) / error > norm.ppf(1 - ALPHA / 2):
            return True
    return False


def drift(n: int) -> Any:
    return np.linspace(0.2, 0.7, n)


RAMP = (0.05, 0.2, 0.5)
N, RUNS = 1500, 250


@pytest.mark.parametrize("kind", ["binary", "real"])
def test_peeking_at_every_outcome_through_ramps_and_drift_keeps_the_level(kind) -> None:
    seen = [traffic(seed, N, drift(N), drift(N), RAMP) for seed in range(RUNS)]
    alarms = sum(decided(tally(data, binary=kind == "binary")) for data in seen)
    assert alarms <= most(RUNS)


@pytest.mark.slow
def test_a_z_test_with_peeking_does_exceed_its_level() -> None:
    """The control of the test above, without drift and ramps, which would make it worse."""
    still = sum(peeked_z(traffic(seed, N, 0.3, 0.3)) for seed in range(RUNS))
    assert still > most(RUNS)
    assert sum(decided(tally(traffic(seed, N, 0.3, 0.3))) for seed in range(RUNS)) <= most(RUNS)
    assert sum(peeked_z(traffic(seed, N, drift(N), drift(N), RAMP)) for seed in range(RUNS)) > still


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_probabilities_that_were_not_those_logged_would_be_noticed(rate) -> None:
    """With drift, a ramp that the evidence does not see makes it wrong; logged probabilities make it right."""
    high = np.linspace(rate / 2, min(rate * 1.1, 0.99), 2 * N)
    alarms = 0
    for seed in range(40):
        arm, y, share = traffic(seed, 2 * N, high, high, RAMP)
        alarms += decided(tally((arm, y, np.full_like(share, 0.25))))
    told = sum(decided(tally(traffic(seed, 2 * N, high, high, RAMP))) for seed in range(40))
    assert told <= most(40)
    assert alarms > told


@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize("chances", [(0.3, 0.3), (0.8, 0.8), (0.4, 0.3), (0.3, 0.4)])
def test_summed_over_all_that_can_happen_no_process_expects_to_grow_under_its_null(chances, margin) -> None:
    """Exactly, over four units with a ramp in between: 256 sequences with their probabilities."""
    share = np.array([0.1, 0.1, 0.5, 0.8])
    means = {"better": 0.0, "worse": 0.0, "worse_by": 0.0}
    for arm in itertools.product((0, 1), repeat=4):
        for y in itertools.product((0.0, 1.0), repeat=4):
            chance = 1.0
            for a, seen, pi in zip(arm, y, share, strict=True):
                p = chances[a]
                chance *= (pi if a else 1 - pi) * (p if seen else 1 - p)
            found = tally((np.array(arm), np.array(y), share), margin=margin)
            for name in means:
                means[name] += chance * math.exp(getattr(found, name).now)
    control, candidate = chances
    if candidate <= control:
        assert means["better"] <= 1 + 1e-12
    if candidate >= control:
        assert means["worse"] <= 1 + 1e-12
    if candidate == control:
        assert means["better"] == pytest.approx(1)
        assert means["worse"] == pytest.approx(1)
    if candidate >= control - (margin or 0.0) - 1e-9:
        assert means["worse_by"] <= 1 + 1e-12
    if candidate > control:
        assert means["better"] > 1.0001


def plain(data: Any, sign: float) -> float:
    """The reference of the process of a binary outcome, unit by unit: its current logarithm."""
    products = [1.0] * len(SHIFTS)
    total = count = 0.0
    for a, y, pi in zip(*data, strict=True):
        m = (total + 0.5) / (count + 1)
        centre = math.log(m / (1 - m))
        for place, shift in enumerate(SHIFTS):
            q1 = 1 / (1 + math.exp(-(centre + sign * shift * (1 - pi))))
            q0 = 1 / (1 + math.exp(-(centre - sign * shift * pi)))
            p = pi * q1 + (1 - pi) * q0
            q = q1 if a else q0
            products[place] *= q / p if y else (1 - q) / (1 - p)
        total, count = total + y, count + 1
    return math.log(sum(products) / len(products))


def plain_bets(data: Any, delta: float) -> float:
    """The reference of `worse by more than delta`."""
    products = [1.0] * len(BETS)
    total = count = 0.0
    for a, y, pi in zip(*data, strict=True):
        m = (total + 0.5) / (count + 1)
        loss = max((1 - pi) * (1 - m), pi * m) + pi * (1 - pi) * delta
        gain = -((a - pi) * (y - m) + pi * (1 - pi) * delta)
        for place, bet in enumerate(BETS):
            products[place] *= 1 + min(bet, 0.9 / loss) * gain
        total, count = total + y, count + 1
    return math.log(sum(products) / len(products))


def test_it_is_the_plain_formula_however_the_outcomes_are_cut_into_pieces() -> None:
    data = traffic(1, 300, 0.3, 0.4, RAMP)
    whole, pieces = tally(data, margin=0.02), OutcomeTally.empty(binary=True, margin=0.02)
    for start, end in itertools.pairwise((0, 1, 7, 100, 100, 300)):
        pieces = pieces.after(*(part[start:end] for part in data))
    for name, reference in (
        ("better", plain(data, 1)),
        ("worse", plain(data, -1)),
        ("worse_by", plain_bets(data, 0.02)),
    ):
        assert getattr(whole, name).now == pytest.approx(reference)
        assert getattr(pieces, name).now == pytest.approx(reference)
        assert getattr(pieces, name).peak == pytest.approx(getattr(whole, name).peak)
    assert pieces.interval(ALPHA) == pytest.approx(whole.interval(ALPHA))
    assert pieces.counts == whole.counts


def test_outcomes_of_a_time_when_an_arm_had_no_traffic_compare_nothing() -> None:
    arm, y, share = traffic(1, 300, 0.3, 0.4)
    more = (np.concatenate([arm, np.zeros(50, dtype=np.int64)]), np.concatenate([y, np.ones(50)]))
    assert tally((*more, np.concatenate([share, np.zeros(50)]))) == tally((arm, y, share))


@pytest.mark.parametrize("binary", [True, False])
def test_a_difference_is_found_in_the_right_direction_and_named_with_its_size(binary) -> None:
    found = tally(traffic(3, 4000, 0.5, 0.4, RAMP), binary=binary, margin=0.02)
    assert found.worse.peak >= math.log(2 / ALPHA)
    assert found.worse_by.peak >= math.log(2 / ALPHA)
    assert found.better.peak < math.log(2 / ALPHA)
    low, high = found.interval(ALPHA) or (0.0, 0.0)
    assert low < -0.1 < high < 0
    assert found.difference == pytest.approx(-0.1, abs=0.05)


def test_a_margin_forgives_what_is_within_it() -> None:
    wrong = sum(
        tally(traffic(seed, 3000, 0.5, 0.45), margin=0.05).worse_by.peak >= math.log(1 / ALPHA) for seed in range(60)
    )
    assert wrong <= most(60)


@pytest.mark.parametrize(("control", "candidate"), [(0.02, 0.02), (0.3, 0.4)])
def test_the_interval_holds_at_every_look_also_of_rare_outcomes_and_through_a_ramp(control, candidate) -> None:
    missed, n, looks = 0, 4000, np.unique(np.geomspace(60, 4000, 30).astype(int)).tolist()
    for seed in range(60):
        data = traffic(seed, n, control, candidate, RAMP)
        found = OutcomeTally.empty(binary=True, margin=None, hides=False)
        for start, end in itertools.pairwise([0, *looks]):
            found = found.after(*(part[start:end] for part in data))
            low, high = found.interval(ALPHA) or (-1.0, 1.0)
            if not low <= candidate - control <= high:
                missed += 1
                break
    assert missed <= most(60)


@pytest.mark.parametrize(("rate", "width"), [(0.02, 0.03), (0.5, 0.1)])
def test_the_interval_becomes_narrow(rate, width) -> None:
    low, high = tally(traffic(1, 10_000, rate, rate)).interval(ALPHA) or (-1.0, 1.0)
    assert high - low < width


def test_the_interval_of_a_handful_tells_little_and_without_an_outcome_of_each_arm_there_is_none() -> None:
    low, high = tally(traffic(1, 19, 0.3, 0.4)).interval(ALPHA) or (0.0, 0.0)
    assert high - low > 1.5
    one_arm = tally((np.ones(50, dtype=np.int64), np.ones(50), np.full(50, 0.5)))
    assert one_arm.interval(ALPHA) is None
    assert one_arm.difference is None


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.03, 0.3, 0.9])
@pytest.mark.parametrize("ramp", [(0.5,), RAMP, (0.5, 0.05, 0.5)])
@pytest.mark.parametrize("binary", [True, False])
def test_false_alarms_stay_under_the_level_in_two_thousand_experiments(rate, ramp, binary) -> None:
    chances = np.linspace(rate, min(1.05 * rate + 0.02, 1), 4000)
    alarms = sum(decided(tally(traffic(seed, 4000, chances, chances, ramp), binary=binary)) for seed in range(2000))
    assert alarms <= most(2000)
