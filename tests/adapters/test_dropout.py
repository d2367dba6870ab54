"""Dropout has the right rate and scale, independent elements and layers, and repeats with the same seed."""

from __future__ import annotations

import pytest
import torch
from small_models import build
from torch import nn

from turret.adapters import attach, detach
from turret.adapters.hooks import RoutedDropout
from turret.methods import Head
from turret.ops.dropout import Masks, dropout


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rate_and_the_mean_are_right(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1_000_003, dtype=dtype)
    y = dropout(x, p)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert y.float().mean().item() == pytest.approx(1.0, abs=1e-2)
    assert y.unique().numel() <= 2


def test_a_rate_of_one_leaves_nothing() -> None:
    assert not dropout(torch.ones(100), 1.0).any()


def test_neighbouring_elements_are_independent() -> None:
    torch.manual_seed(0)
    kept = (dropout(torch.ones(400_000), 0.3) != 0).float().view(-1, 4)
    correlation = torch.corrcoef(kept.mT) - torch.eye(4)
    assert correlation.abs().max() < 0.01


def test_the_layers_of_a_pass_have_independent_masks() -> None:
    torch.manual_seed(0)
    masks, x = Masks(), torch.ones(20_000)
    kept = torch.stack([(dropout(x, 0.5, masks) != 0).float() for _ in range(40)])
    correlation = torch.corrcoef(kept) - torch.eye(40)
    assert correlation.abs().max() < 0.05  # five standard errors of independent bits are 0.035
    assert (kept.mean(1) - 0.5).abs().max() < 0.02


def test_a_larger_layer_of_the_same_pass_gets_a_whole_mask() -> None:
    masks = Masks()
    for size in (10, 100_000, 30, 1_000_000):
        assert dropout(torch.ones(size), 0.5, masks).shape == (size,)


def test_a_seed_repeats_it_and_gradients_take_the_same_mask() -> None:
    x = torch.randn(7, 5, 3, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(x, 0.4)
    first.sum().backward()
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.4))
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, first)


def test_the_bases_own_dropout_layers_are_replaced_follow_its_mode_and_come_back() -> None:
    model = build("bert", "classify")
    own = {path: each for path, each in model.named_modules() if isinstance(each, nn.Dropout)}
    assert own
    attach(model, Head()).train()
    for path in own:
        replaced = model.get_submodule(path)
        assert isinstance(replaced, RoutedDropout)
        assert replaced.p == own[path].p
        assert own[path].training
    layer, x = next(iter(own)), torch.ones(50, 50)
    assert (model.get_submodule(layer)(x) == 0).any()
    model.eval()
    assert torch.equal(model.get_submodule(layer)(x), x)
    detach(model)
    assert all(model.get_submodule(path) is each and not each.training for path, each in own.items())
