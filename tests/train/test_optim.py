"""The optimiser equals torch's AdamW, and the learning rate follows the recipe's schedule."""

from __future__ import annotations

import math

import peft
import pytest
import tiny_training
import torch
from batches import padded, rows
from peft.optimizers import create_loraplus_optimizer
from small_models import build
from torch import nn

from turret.adapters import attach, extract
from turret.adapters.prefix import PrefixGroup
from turret.engine.protocol import OptimStep
from turret.errors import TrainingError
from turret.families import FAMILIES
from turret.methods import LoRA
from turret.ops.structs import GRADIENT_STAYS
from turret.recipe import Recipe
from turret.train.adamw import AdamW, learning_rate, warmup_steps
from turret.train.initialize import optimiser_of
from turret.train.losses import backward


def twins() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    other = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ten_updates_equal_those_of_torch(decay: float) -> None:
    ours, theirs = twins()
    mine = AdamW(dict(ours.named_parameters()))
    matrices = [each for each in theirs.parameters() if each.ndim >= 2]
    vectors = [each for each in theirs.parameters() if each.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2)
    x = torch.randn(4, 5)
    for step in range(1, 11):
        rate = learning_rate(step, total=10, peak=1e-2, warmup=2, schedule="linear")
        mine.zero_gradients()
        ours(x).square().mean().backward()
        norm = mine.clip_gradients(0.5)
        mine.step(OptimStep(rate, decay))

        reference.zero_grad()
        theirs(x).square().mean().backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        assert norm == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_state_that_is_put_back_goes_on_to_the_same_bits() -> None:
    one, other = twins()
    x = torch.randn(4, 5)

    def go(model: nn.Module, optimiser: AdamW, steps: int) -> None:
        for _ in range(steps):
            optimiser.zero_gradients()
            model(x).square().mean().backward()
            optimiser.step(OptimStep(1e-2, weight_decay=0.1))

    first = AdamW(dict(one.named_parameters()))
    go(one, first, 3)
    second = AdamW(dict(other.named_parameters()))
    second.load_state({name: row.clone() for name, row in first.state().items()}, first.steps)
    go(one, first, 3)
    go(other, second, 3)
    assert torch.equal(first.weights, second.weights)


def test_moving_the_row_tells_whoever_caches_by_version() -> None:
    layer = nn.Linear(3, 2)
    optimiser = AdamW(dict(layer.named_parameters()))
    before = layer.weight._version
    optimiser.set_weights(torch.zeros_like(optimiser.weights))
    assert layer.weight._version > before
    assert not layer.weight.any()


def test_its_end_gives_back_all_but_the_weights() -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    optimiser = AdamW({"a": parameter})
    optimiser.gradients.fill_(1.0)
    optimiser.step(OptimStep(0.1))
    before = parameter.detach().clone()
    optimiser.end()
    assert torch.equal(parameter, before)
    assert parameter.grad is None
    kept = optimiser.state()
    assert [each.numel() for each in (optimiser.gradients, kept["exp_avg"], kept["exp_avg_sq"])] == [0, 0, 0]


def test_weights_in_half_precision_are_refused_with_the_remedy() -> None:
    with pytest.raises(TrainingError, match=r"weight is bfloat16.*train.dtype to float32"):
        AdamW(dict(nn.Linear(2, 2).bfloat16().named_parameters()))
    with pytest.raises(TrainingError, match="nothing to train"):
        AdamW({})


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_its_peak_and_no_step_is_spent_at_zero(schedule: str) -> None:
    rates = [learning_rate(step, total=20, peak=1.0, warmup=4, schedule=schedule) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(rate > 0 for rate in rates)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == (1.0 if schedule == "constant" else pytest.approx(rates[-1]))
    if schedule == "linear":
        assert rates[-1] == pytest.approx(1 / 17)
    assert learning_rate(1, total=1, peak=1.0, warmup=0, schedule=schedule) > 0.4


def test_warmup_is_a_share_or_a_number_of_steps() -> None:
    assert [warmup_steps(each, 100) for each in (0, 0.06, 0.5, 1, 30, 1000)] == [0, 6, 50, 1, 30, 100]


def test_a_gradient_that_is_not_finite_is_reported_and_not_scaled() -> None:
    layer = nn.Linear(2, 1)
    optimiser = AdamW(dict(layer.named_parameters()))
    optimiser.gradients.fill_(math.inf)
    assert optimiser.clip_gradients(1.0) == math.inf


def test_a_gradient_that_stays_is_added_to_and_is_a_prefixs_own() -> None:
    """The largest gradient of a prefix is written into the optimiser's row, and no other `grad` is overwritten."""

    def gradients(group: PrefixGroup, passes: int) -> list[torch.Tensor]:
        for _ in range(passes):
            backward(group.folded_keys_values().square().sum())
        return [each.grad.clone() for each in group.parameters() if each.grad is not None]

    torch.manual_seed(1)
    start = torch.randn(2, 2, 2, 5, 8)
    groups = [PrefixGroup(start, 16, torch.Generator().manual_seed(0)) for _ in range(2)]
    wanted = gradients(groups[0], 2)
    optimiser = AdamW(dict(groups[1].named_parameters()))
    outer = groups[1].outer_weight
    given = gradients(groups[1], 2)
    assert len(given) == len(wanted) == 5
    for mine, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert outer.grad is not None
    assert outer.grad.untyped_storage().data_ptr() == optimiser.gradients.untyped_storage().data_ptr()
    assert not hasattr(groups[0].outer_weight, GRADIENT_STAYS)
    optimiser.end()
    assert not hasattr(outer, GRADIENT_STAYS)
    assert outer.grad is None
    assert torch.autograd.grad(groups[1].folded_keys_values().square().sum(), outer)[0] is not None


@pytest.mark.parametrize("ratio", [16.0, None])
def test_lora_plus_moves_a_and_b_at_pefts_rates(ratio: float | None) -> None:
    """The first step of Adam moves a number by its rate: A and B by those of PEFT's `create_loraplus_optimizer`."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"])
    twin = peft.get_peft_model(build("bert", "classify"), config)
    theirs = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio or 1.0)
    rates = {id(each): group["lr"] for group in theirs.param_groups for each in group["params"]}
    expected = {
        factor: {rates[id(each)] for name, each in twin.named_parameters() if factor in name}
        for factor in ("lora_A", "lora_B")
    }
    method = LoRA(r=3, lora_alpha=6, lora_dropout=0.0, init_lora_weights=False, lora_plus_ratio=ratio)
    model = attach(build("bert", "classify"), method, generator=torch.Generator().manual_seed(1))
    train = {"lr": 1e-3, "weight_decay": 0.0}
    recipe = Recipe(name="x", base="small", data={"source": "x"}, method=method, train=train)
    mine = optimiser_of(recipe, tiny_training.Base(model, None, FAMILIES["bert"]))
    before = extract(model).tensors
    mine.zero_gradients()
    nn.functional.cross_entropy(model(**padded(rows(), 0)).logits, torch.tensor([0, 2, 1, 0])).backward()
    mine.step(OptimStep(1e-3))
    for name, value in extract(model).tensors.items():
        (rate,) = expected["lora_A" if "lora_A" in name else "lora_B"]
        assert float((value - before[name]).abs().max()) == pytest.approx(rate, rel=1e-2)
