"""Cheap dropout: the right rate, the right scale, independent elements, and the generator's own repeatability."""

from __future__ import annotations

import pytest
import torch

from turret.adapters.dropout import dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_rate_and_the_mean_are_right(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1_000_003)
    y = dropout(x, p)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert y.mean().item() == pytest.approx(1.0, abs=1e-2)
    assert y.unique().numel() <= 2


def test_the_four_elements_of_one_draw_are_independent() -> None:
    torch.manual_seed(0)
    kept = (dropout(torch.ones(400_000), 0.3) != 0).float().view(-1, 4)
    correlation = torch.corrcoef(kept.mT) - torch.eye(4)
    assert correlation.abs().max() < 0.01


def test_a_seed_repeats_it_and_gradients_take_the_same_mask() -> None:
    x = torch.randn(7, 5, 3, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(x, 0.4)
    first.sum().backward()
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.4))
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, first)
