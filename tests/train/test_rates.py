"""Which learning rates are tried and which one is chosen, on made-up scores."""

from __future__ import annotations

import math
import random

import pytest

from turret.train.lr_finder import Score, is_better, search
from turret.train.training_plan import FEWEST_HELD, MOST_HELD, MOST_STEPS, MOST_TRIALS, FoundRate, size_of


def at(mean: float | None, count: int = 50) -> Score | None:
    """Scores of the same examples, each with its own offset, so that differences are all alike."""
    if mean is None:
        return None
    hard = random.Random(0)
    return Score(tuple(mean + hard.gauss(0, 1) for _ in range(count)), (1,) * count)


def searched(losses: dict[float, float | None]) -> tuple[float, set[float]]:
    """The chosen factor and those that were tried, if the default is 1; factors that are not named diverge."""
    rounded = {round(math.log10(factor), 2): loss for factor, loss in losses.items()}
    lr, scores = search(1.0, lambda rate: at(rounded.get(round(math.log10(rate), 2))))
    return round(lr, 3), {round(rate, 3) for rate in scores}


@pytest.mark.parametrize(
    ("losses", "taken", "tried"),
    [
        ({1: 1.0, 3: 1.0}, 1, {1, 3}),  # equal: the default, and nothing more is tried
        ({1: 1.0, 3: 0.5, 10: 0.7}, 1, {1, 3, 10}),  # the best of a short trial is too large for the run
        ({1: 1.0, 3: 0.5, 10: 0.5}, 3, {1, 3, 10}),  # the next one up is no worse
        ({1: 1.0, 3: 0.5, 10: 0.2, 30: 1.5}, 3, {1, 3, 10, 30}),
        ({1: 1.0, 3: 0.5, 10: 0.2, 30: 0.1}, 10, {1, 3, 10, 30}),  # the end of what is tried
        ({1: 1.0, 3: 2.0, 1 / 3: 1.2}, 1, {1, 3, 0.333}),
        ({1: 1.0, 3: 2.0, 1 / 3: 1.0}, 1, {1, 3, 0.333}),
        ({1: 1.0, 3: 2.0, 1 / 3: 0.6, 1 / 10: 0.8}, 0.333, {1, 3, 0.333, 0.1}),
        ({1: None}, 1, {1, 0.333, 0.1, 0.033}),
        ({1: None, 1 / 3: None, 1 / 10: None, 1 / 30: 0.5}, 0.033, {1, 0.333, 0.1, 0.033}),
        ({1: None, 1 / 3: 0.4, 1 / 10: 0.5}, 0.1, {1, 0.333, 0.1}),  # not right below one that diverges
        ({1: 1.0, 3: 2.0, 1 / 3: 0.9, 1 / 10: 0.5, 1 / 30: 0.3}, 0.033, {1, 3, 0.333, 0.1, 0.033}),
        ({1: 1.0, 3: None, 1 / 3: 1.1}, 1, {1, 3, 0.333}),
        ({1: 1.0, 3: 0.5, 10: None}, 1, {1, 3, 10}),
    ],
)
def test_rates_are_tried_outward_and_a_large_one_needs_room_above_it(
    losses: dict[float, float | None], taken: float, tried: set[float]
) -> None:
    assert searched(losses) == (taken, tried)
    assert len(tried) <= MOST_TRIALS


def test_a_difference_within_two_standard_errors_is_noise() -> None:
    chance = random.Random(1)
    noise = [chance.gauss(0, 1) for _ in range(100)]
    one = Score(tuple(noise), (1,) * 100)
    spread = [chance.gauss(0.02, 1) + each for each in noise]
    assert not is_better(one, Score(tuple(spread), (1,) * 100))
    assert is_better(one, Score(tuple(each + 0.02 for each in noise), (1,) * 100))
    assert not is_better(Score(tuple(each + 0.02 for each in noise), (1,) * 100), one)
    assert not is_better(one, one)


def test_an_example_counts_by_its_target_tokens() -> None:
    weights = (1, 2, 30, 4)
    one = Score(tuple(2.0 * weight for weight in weights), weights)
    other = Score(tuple(2.1 * weight for weight in weights), weights)
    assert one.mean == pytest.approx(2.0)
    assert is_better(one, other)  # the same gain a token everywhere: no noise at all


def test_a_trial_is_a_fifth_of_the_run_within_bounds_and_too_little_gives_a_reason() -> None:
    assert size_of(400, 150).steps == 30
    assert size_of(400, 40).steps == 10
    assert size_of(100_000, 37_500).steps == MOST_STEPS
    assert size_of(100_000, 37_500).held == MOST_HELD
    assert size_of(80, 40).held == FEWEST_HELD
    assert size_of(79, 40).reason == "79 training examples are too few to compare rates; at least 80 are needed"
    assert size_of(400, 39).reason == "39 steps are too few to try rates first; at least 40 are needed"


def test_what_was_found_reads_in_a_line_and_keeps_the_whole_table() -> None:
    size = size_of(400, 200)
    found = FoundRate(0.003, 0.001, size, {0.001: 0.47, 0.003: 0.41, 0.01: 0.4, 0.03: None})
    assert (
        str(found) == "0.003, found by trying 4 rates for 40 steps each (held-out loss 0.41, 0.47 at the default 0.001)"
    )
    assert found.note().endswith(": 0.001: 0.47, 0.003: 0.41, 0.01: 0.4, 0.03: diverged")
    assert found.to_json()["tried"][3] == {"lr": 0.03, "loss": None}
    kept = FoundRate(0.001, 0.001, size, {0.001: None, 0.003: None})
    assert "this method's own" in str(kept)
    none = FoundRate(0.001, 0.001, size_of(10, 200), {})
    assert "too few" in str(none)
    assert "too few" in none.note()
