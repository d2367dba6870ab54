"""In float16 the loss is scaled: small gradients survive, an overflow costs no batch, and a resumed run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from batches import without_dropout
from tiny_training import fit

from turret.engine.protocol import OptimStep
from turret.errors import LossNotFinite, TrainingError
from turret.train.losses import FIRST, PATIENCE, SMALLEST, LossScale
from turret.train.slot import LocalSlot

STEP = OptimStep(1e-3, clip=None)


def half() -> Any:
    base = tiny.base("bert")
    without_dropout(base.model).to(torch.float16)
    base.dtype = torch.float16
    return base


def started() -> tuple[Any, ...]:
    base = half()
    task, optimiser, items = tiny.started(base, method__lora_dropout=0.0)
    return LocalSlot(base, task, optimiser, 42, 256), items


def gradients(scale: LossScale | None, loss_factor: float = 1.0) -> torch.Tensor:
    """The gradients that an update would use, with the loss made smaller and the gradients larger by a factor."""
    slot, items = started()
    kept = []
    slot.optimiser.step = lambda how: kept.append(slot.optimiser.gradients.clone())
    whole = slot.task.loss
    slot.task.loss = lambda logits, targets: whole(logits, targets) * loss_factor
    slot.scale = scale
    slot.train_step(items, STEP)
    return kept[0] / loss_factor


def test_only_float16_is_scaled() -> None:
    assert LossScale.of(torch.float16) == LossScale(FIRST, 0)
    assert LossScale.of(torch.bfloat16) is None
    assert LossScale.of(torch.float32) is None


def test_the_scale_moves_as_torchs_own_does() -> None:
    """torch leaves out a step that overflows, and this computes it again: the scales that follow are the same."""
    overflows = [True, True, False, True] + [False] * (PATIENCE + 3)
    theirs = torch.amp.GradScaler("cpu", enabled=True)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    ours = LossScale()
    for overflow in overflows:
        theirs.scale(weight.sum() * 1.0).backward()
        if overflow:
            assert weight.grad is not None
            weight.grad.fill_(torch.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        if overflow:
            assert ours.lower()
        else:
            ours.count_passed_step()
        assert ours.value == theirs.get_scale()


def test_small_gradients_survive_with_a_scale_and_vanish_without() -> None:
    plain, scaled = gradients(None, 1e-7), gradients(LossScale(), 1e-7)
    exact = gradients(LossScale())
    assert float((scaled - exact).norm() / exact.norm()) < 2e-2
    assert float((plain - exact).norm() / exact.norm()) > 0.2  # control: that is what the scale is for


def test_a_step_that_overflows_is_computed_again_with_half_the_scale() -> None:
    scale = LossScale(2.0**40)
    found = gradients(scale)
    assert torch.isfinite(found).all()
    assert scale.value < 2.0**40
    assert float((found - gradients(LossScale())).norm() / found.norm()) < 2e-2


def test_gradients_that_no_scale_makes_finite_end_the_training() -> None:
    slot, items = started()
    clip = slot.optimiser.clip_gradients
    slot.optimiser.clip_gradients = lambda largest: (clip(largest), torch.inf)[1]
    with pytest.raises(LossNotFinite, match="norm of the gradients became inf"):
        slot.train_step(items, STEP)


def accumulated(scale: LossScale | None) -> tuple[float, torch.Tensor]:
    """The norm and the gradients of a step for two batches that are added one after the other."""
    slot, items = started()
    kept = []
    slot.optimiser.step = lambda how: kept.append(slot.optimiser.gradients.clone())
    slot.scale = scale
    for batch in (items[:4], items[4:]):
        slot.forward_backward(batch)
    return slot.optim_step(STEP), kept[0]


def test_batches_that_are_added_are_divided_by_the_scale_once() -> None:
    scale = LossScale(1024.0)
    (norm, plain), (scaled_norm, scaled) = accumulated(None), accumulated(scale)
    assert scaled_norm == pytest.approx(norm, rel=2e-2)
    assert float((scaled - plain).norm() / plain.norm()) < 2e-2
    assert scale == LossScale(1024.0, 1), "a step without an overflow is counted"


def test_the_verbs_one_by_one_are_the_step_of_the_training_loop_with_a_scale_too() -> None:
    one, items = started()
    other, _ = started()
    for slot in (one, other):
        slot.scale = LossScale(1024.0, PATIENCE - 2)
    for _ in range(3):
        assert (one.forward_backward(items), one.optim_step(STEP)) == other.train_step(items, STEP)
    assert torch.equal(one.optimiser.weights, other.optimiser.weights)
    assert one.scale == other.scale == LossScale(2048.0, 1)


def test_a_step_of_added_batches_that_overflows_halves_the_scale() -> None:
    slot, items = started()
    before, slot.scale = slot.optimiser.weights.clone(), LossScale(2.0**40)
    tries = 0
    while True:
        tries += 1
        slot.forward_backward(items)
        try:
            norm = slot.optim_step(STEP)
            break
        except LossNotFinite:
            assert slot.scale.value == 2.0 ** (40 - tries)
            assert torch.equal(slot.optimiser.weights, before)
    assert 1 < tries < 40
    assert norm == pytest.approx(float(gradients(LossScale()).norm()), rel=2e-2)


def test_a_loss_that_is_not_finite_leaves_the_scale_and_no_step_takes_it_below_the_smallest() -> None:
    slot, items = started()
    whole = slot.task.loss
    slot.task.loss = lambda logits, targets: whole(logits, targets) * torch.inf
    slot.forward_backward(items)
    with pytest.raises(LossNotFinite):
        slot.optim_step(STEP)
    assert slot.scale == LossScale()
    slot.task.loss = whole
    for expected in (SMALLEST, SMALLEST):
        slot.scale.value = min(slot.scale.value, 2 * SMALLEST)
        slot.forward_backward(items)
        slot.optimiser.gradients[0] = torch.inf
        with pytest.raises(LossNotFinite):
            slot.optim_step(STEP)
        assert slot.scale.value == expected


def test_gradients_that_were_added_before_a_step_of_the_loop_are_dropped() -> None:
    slot, items = started()
    slot.forward_backward(items[:4])
    slot.train_step(items, STEP)
    with pytest.raises(TrainingError, match="call forward_backward first"):
        slot.optim_step(STEP)


@pytest.mark.slow
def test_a_run_in_float16_learns_and_resumes_with_its_scale(tmp_path: Path) -> None:
    def steps(folder: Path, stop: int | None = None) -> tuple[list[float], Any]:
        base, data = half(), tiny.dataset()
        recipe = tiny.recipe(train__lr=1e-2, train__checkpoint_every=2, train__epochs=4, method__lora_dropout=0.0)
        run = fit(recipe, base, tiny.task_of(recipe, data, base), data, folder=folder)
        losses: list[float] = []
        while True:
            try:
                losses.append(next(run).loss)
            except StopIteration as end:
                return losses, end.value
            if stop is not None and len(losses) == stop:
                run.close()
                return losses, None

    whole, fitted = steps(tmp_path / "whole")
    assert whole[-1] < 0.6 * whole[0]
    first, _ = steps(tmp_path / "broken", stop=5)
    rest, again = steps(tmp_path / "broken")
    assert again.resumed_from == 4
    assert first[:4] + rest == whole
    for name, tensor in fitted.adapter.tensors.items():
        assert torch.equal(tensor, again.adapter.tensors[name])
