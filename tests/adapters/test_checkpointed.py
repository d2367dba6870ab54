"""Layers that are computed again give the same gradients, bit for bit, and save less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import rows, with_eos
from marks import kind_of, pairs
from small_models import FAMILIES, GENERATORS, RELATIVES, build

from turret.adapters import attach, checkpoint_layers, classify_logits, detach, target_logits
from turret.errors import AdapterError
from turret.methods import Full, LoRA, Peft, Prefix
from turret.ops.table import without
from turret.train.memory import SavedForBackward

METHODS = [LoRA(r=2, lora_dropout=0.2), Prefix(num_virtual_tokens=3), Full(), Peft(peft_type="IA3")]


def gradients(family: str, task: Any, method: Any, again: bool, **changes: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss, and the gradients by name, of one step with dropout."""
    model: Any = build(family, task, **changes)
    attach(model, method, generator=torch.Generator().manual_seed(1)).train()
    if again:
        checkpoint_layers(model)
    torch.manual_seed(7)
    if task == "classify":
        loss = classify_logits(model, with_eos(model, rows())).float().logsumexp(-1).mean()
    else:
        loss = torch.nn.functional.cross_entropy(target_logits(model, rows(), rows(1)).float(), torch.cat(rows(1)))
    loss.backward()  # type: ignore[no-untyped-call]
    drawn = torch.rand(1)  # what is random after the step is the same too
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    detach(model)
    return loss.detach(), found | {"drawn": drawn}


def require_the_same(family: str, task: str, method: Any) -> None:
    loss, plain = gradients(family, task, method, False)
    again, twice = gradients(family, task, method, True)
    assert torch.equal(loss, again)
    assert plain.keys() == twice.keys()
    assert [name for name in plain if not torch.equal(plain[name], twice[name])] == []


@pytest.mark.parametrize(("family", "method"), pairs(list(FAMILIES), METHODS[:2]), ids=kind_of)
def test_a_classifiers_gradients_are_the_same(family: str, method: Any) -> None:
    require_the_same(family, "classify", method)


@pytest.mark.parametrize("family", GENERATORS)
def test_a_generators_gradients_are_the_same(family: str) -> None:
    require_the_same(family, "generate", METHODS[0])


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
@pytest.mark.parametrize("method", METHODS[2:], ids=lambda method: method.kind)
def test_every_other_methods_gradients_are_the_same(family: str, method: Any) -> None:
    require_the_same(family, "classify", method)


@pytest.mark.slow
@pytest.mark.parametrize("family", [each for each in RELATIVES if each not in ("deberta-v2", "mpnet", "pegasus")])
@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.kind)
def test_a_relatives_gradients_are_the_same(family: str, method: Any) -> None:
    if (family, method.kind) == ("big_bird", "prefix"):
        with pytest.raises(AdapterError, match="computes its attention itself"):
            require_the_same(family, "classify", method)
        return
    require_the_same(family, "classify", method)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_they_are_the_same_without_kernels(family: str) -> None:
    with without("kernels"):
        require_the_same(family, "classify", METHODS[0])


@pytest.mark.parametrize("family", ["deberta-v2", "mpnet"])
def test_they_are_the_same_where_rows_pass_alone(family: str) -> None:
    require_the_same(family, "classify", METHODS[0])


def saved_bytes(layers: int, again: bool) -> int:
    """What a step of LoRA on all linear layers keeps for its backward pass."""
    model: Any = build("llama", "classify", num_hidden_layers=layers)
    attach(model, LoRA(r=2, target_modules="all-linear"), generator=torch.Generator().manual_seed(1)).train()
    if again:
        checkpoint_layers(model)
    saved = SavedForBackward(model)
    with saved.counting():
        classify_logits(model, [torch.arange(5, 105)])
    return saved.bytes


def test_what_is_kept_no_longer_grows_by_what_each_layer_saves() -> None:
    plain = saved_bytes(6, False) - saved_bytes(2, False)
    again = saved_bytes(6, True) - saved_bytes(2, True)
    assert again < 0.15 * plain


FIRST = """
import sys
sys.path[:0] = {paths!r}
from small_models import build
from turret.adapters import attach, checkpoint_layers, classify_logits
from turret.methods import LoRA
from batches import rows
model = attach(build("llama", "classify"), LoRA(r=2)).train()
checkpoint_layers(model)
classify_logits(model, rows()).square().sum().backward()
print("passed")
"""


@pytest.mark.slow
def test_the_very_first_pass_of_a_process_can_be_computed_again() -> None:
    program = FIRST.format(paths=[str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "passed", done.stderr[-600:]


def test_detaching_leaves_no_trace() -> None:
    model: Any = build("bert", "classify")
    before = {path: type(each).forward for path, each in model.named_modules()}
    attach(model, LoRA(r=2))
    checkpoint_layers(model)
    assert any("forward" in vars(each) for each in model.modules())
    detach(model)
    assert not any("forward" in vars(each) for each in model.modules())
    assert before == {path: type(each).forward for path, each in model.named_modules()}
