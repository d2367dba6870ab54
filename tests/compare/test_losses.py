"""Losses that are flat, risen, still falling at the last step, or none of these."""

from __future__ import annotations

import numpy as np
import pytest

from turret.compare.collapse import binned_losses, describe_losses, still_falling

TIME = np.linspace(0, 1, 60)


def noisy(losses: np.ndarray, noise: float = 0.01) -> list[float]:
    return (losses + noise * np.random.default_rng(0).standard_normal(len(losses))).tolist()


@pytest.mark.parametrize("constants", [0.5, 1, 2])
def test_a_loss_that_falls_to_the_last_step_is_still_falling(constants: float) -> None:
    assert still_falling(noisy(0.1 + 0.6 * np.exp(-constants * TIME)))
    assert still_falling(noisy(0.7 - 0.5 * TIME))
    assert still_falling(noisy(np.where(TIME < 0.7, 0.69, 0.69 - 1.5 * (TIME - 0.7)))), "learnt late"


@pytest.mark.parametrize("constants", [6, 10, 30])
def test_a_loss_that_has_settled_is_not(constants: float) -> None:
    assert not still_falling(noisy(0.1 + 0.6 * np.exp(-constants * TIME)))


def test_a_fall_within_the_noise_is_no_fall() -> None:
    assert not still_falling(noisy(0.69 - 0.05 * TIME, noise=0.2))


def test_a_flat_or_risen_loss_is_told_and_never_still_falling() -> None:
    flat, risen = noisy(np.full(60, 0.693)), noisy(0.7 + 2 * TIME)
    assert describe_losses(flat) == "loss flat at 0.69"
    assert describe_losses(risen).startswith("loss rose from 0.7")
    assert describe_losses(noisy(0.7 - 0.5 * TIME)) is None
    assert not still_falling(flat)
    assert not still_falling(risen)


def test_a_handful_of_losses_says_nothing() -> None:
    assert describe_losses([0.7] * 5) is None
    assert not still_falling([0.7, 0.5, 0.3, 0.1])


def test_many_losses_become_means_over_equal_stretches() -> None:
    assert binned_losses([1.0, 2.0]) == [1.0, 2.0]
    assert binned_losses(list(range(120)), most=60) == [2 * place + 0.5 for place in range(60)]
