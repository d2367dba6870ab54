"""An e-process: its mean, its peak and its first step above a level, however the steps are cut into pieces."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret.statistics import EProcess, capped_e_value, log_mean

STEPS = st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=12)


def means(steps: np.ndarray) -> np.ndarray:
    """The reference: the mean of the products after each step."""
    return np.exp(np.cumsum(steps, axis=0)).mean(axis=1)


@given(STEPS, st.integers(0, 12))
def test_pieces_give_the_mean_and_the_peak_of_the_whole(steps, cut) -> None:
    factors = np.array(steps)
    found = EProcess.of(2).through(factors[:cut]).through(factors[cut:])
    expected = means(factors)
    assert found.now == pytest.approx(math.log(expected[-1]), abs=1e-9)
    assert found.peak == pytest.approx(math.log(max(1.0, expected.max())), abs=1e-9)  # it starts at 1


@given(STEPS, st.floats(-2, 2))
def test_the_first_step_above_a_level_is_the_first(steps, level) -> None:
    factors = np.array(steps)
    logs = np.log(means(factors))
    found = EProcess.of(2).first(factors, level)
    assert all(logs[:found] < level + 1e-9)
    assert found == len(logs) or logs[found] >= level - 1e-9


def test_a_level_that_is_just_reached_counts_and_none_is_ever_infinite() -> None:
    steps = np.array([[0.5, 0.5], [0.5, 0.5], [3.0, 3.0]])
    assert EProcess.of(2).first(steps, 1.0) == 1
    assert EProcess.of(2).first(steps, math.inf) == 3
    assert EProcess.of(2).first(steps, 100.0) == 3


def test_no_step_changes_nothing() -> None:
    process = EProcess.of(3).through(np.ones((2, 3)))
    assert process.through(np.ones((0, 3))) == process


def test_a_mean_of_products_beyond_a_floats_range_has_a_logarithm() -> None:
    assert log_mean(np.array([[5000.0, 5000.0], [-5000.0, -5000.0]])) == pytest.approx([5000, -5000])


def test_an_e_value_is_itself_as_far_as_json_holds_it() -> None:
    assert capped_e_value(math.log(40)) == pytest.approx(40)
    assert json.loads(json.dumps(capped_e_value(1e6), allow_nan=False)) > 1e299
