"""Moments in 8 bits: bitsandbytes' own optimiser step by step, a quarter of the bytes, and an exact resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from four_bits import needs_bitsandbytes
from tiny_training import fit
from torch import nn

from turret import quantized
from turret.engine.protocol import OptimStep
from turret.errors import TrainingError
from turret.train.adamw import AdamW, moment_bytes
from turret.train.initialize import require_optimizer

RATES = (1e-2, 3e-2, 1e-2)


def module() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 64)


def stepped(kind: str, ratios: dict[str, float] | None = None, decay: float = 0.0) -> tuple[nn.Linear, AdamW]:
    """A layer after three steps with given gradients."""
    layer = module()
    optimiser = AdamW(dict(layer.named_parameters()), ratios=ratios, kind=kind)
    for place, rate in enumerate(RATES):
        for each in layer.parameters():
            assert each.grad is not None
            each.grad.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(place)))
        optimiser.step(OptimStep(rate, decay))
    return layer, optimiser


@needs_bitsandbytes
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_is_bitsandbytes_own_bit_for_bit(decay: float) -> None:
    mine, _ = stepped("adamw8bit", decay=decay)
    theirs = module()
    groups = [{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}]
    settings = {"weight_decay": decay, "betas": (0.9, 0.999), "eps": 1e-8, "min_8bit_size": 1}
    optimiser = quantized.library().optim.AdamW8bit(groups, **settings)
    for place, rate in enumerate(RATES):
        for group in optimiser.param_groups:
            group["lr"] = rate
        for each in theirs.parameters():
            each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(place))
        optimiser.step()
    assert torch.equal(mine.weight, theirs.weight)
    assert torch.equal(mine.bias, theirs.bias)


@needs_bitsandbytes
def test_it_stays_close_to_moments_in_float32_with_ratios_and_decay() -> None:
    ratios = {"bias": 5.0}
    (mine, optimiser), (plain, _) = (stepped(kind, ratios, 0.1) for kind in ("adamw8bit", "adamw"))
    for one, other, start in zip(mine.parameters(), plain.parameters(), module().parameters(), strict=True):
        assert (one - other).norm() < 0.1 * (other - start).norm()
        assert not torch.equal(one, other)  # the control: the moments are rounded
    kept = sum(each.nbytes for name, each in optimiser.state().items() if name != "weights")
    assert kept == pytest.approx(moment_bytes("adamw8bit", 96 * 64 + 64), abs=64)
    assert kept < 0.3 * moment_bytes("adamw", 96 * 64 + 64)


@pytest.mark.slow
@needs_bitsandbytes
def test_a_run_that_was_stopped_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def steps(folder: Path) -> Any:
        made = tiny_training.recipe(train__optimizer="adamw8bit", train__checkpoint_every=2, train__lr=3e-3)
        on, data = tiny_training.base("bert"), tiny_training.dataset()
        return fit(made, on, tiny_training.task_of(made, data, on), data, folder=folder)

    def run(folder: Path) -> dict[str, torch.Tensor]:
        _, fitted = tiny_training.train(steps(folder))
        return {**fitted.adapter.tensors, **fitted.adapter.head}

    whole = run(tmp_path / "whole")
    stopped = steps(tmp_path / "stopped")
    assert next(record for record in stopped if record.step == 3)
    stopped.close()
    resumed = run(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_without_the_library_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    made: Any = tiny_training.recipe(train__optimizer="adamw8bit")
    with (
        quantized.hide_package("bitsandbytes"),
        pytest.raises(TrainingError, match=r"pip install 'turret\[quantized\]'"),
    ):
        require_optimizer(made)
    require_optimizer(tiny_training.recipe())  # the control


def test_a_restart_forgets_every_step() -> None:
    layer, optimiser = stepped("adamw")
    start = torch.cat([each.detach().flatten() for each in module().parameters()])
    optimiser.restart(start)
    assert torch.equal(optimiser.weights, start)
    assert optimiser.steps == 0
    assert not any(each.any() for name, each in optimiser.state().items() if name != "weights")
    assert torch.equal(layer.weight, module().weight)
