"""Full fine-tuning on a bfloat16 base: float32 weights and gradients, bfloat16 products, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import rows, with_eos, without_dropout
from small_models import FAMILIES, GENERATORS, build

from turret.adapters import attach, classify_logits, mixed_precision, target_logits
from turret.methods import Full, LoRA, Method


def attached(family: str, task: Any, method: Method, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = without_dropout(build(family, task))
    for each in model.parameters():
        each.data = each.data.to(torch.bfloat16).to(dtype)  # the same numbers in either
    return attach(model, method, generator=torch.Generator().manual_seed(3)).train()


def gradients(model: Any, task: str) -> tuple[float, dict[str, torch.Tensor], set[torch.dtype]]:
    """(loss, gradients by name, outputs of linear layers)."""
    given: set[torch.dtype] = set()
    hooks = [
        each.register_forward_hook(lambda _, __, y: given.add(y.dtype))
        for name, each in model.named_modules()
        if type(each).__name__ in ("Linear", "Conv1D") and ("layer" in name or "block" in name or ".h." in name)
    ]
    with mixed_precision(model):
        if task == "classify":
            loss = classify_logits(model, with_eos(model, rows())).float().logsumexp(-1).mean()
        else:
            logits = target_logits(model, rows(), rows(1))
            loss = torch.nn.functional.cross_entropy(logits.float(), torch.cat(rows(1)))
    loss.backward()  # type: ignore[no-untyped-call]
    for each in hooks:
        each.remove()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, given


@pytest.mark.parametrize(
    ("family", "task"), [*((f, "classify") for f in FAMILIES), *((f, "generate") for f in GENERATORS)]
)
def test_products_are_of_the_bases_precision_and_gradients_float32s(family: str, task: str) -> None:
    loss, own, given = gradients(attached(family, task, Full()), task)
    plain_loss, plain, plain_given = gradients(attached(family, task, Full(), torch.float32), task)
    assert torch.bfloat16 in given
    assert plain_given == {torch.float32}
    assert own.keys() == plain.keys()
    assert {each.dtype for each in own.values()} == {torch.float32}
    assert loss == pytest.approx(plain_loss, rel=0.01)
    mine, reference = (torch.cat([side[name].flatten() for name in sorted(side)]) for side in (own, plain))
    assert not torch.equal(mine, reference)  # the control: they were computed another way
    assert torch.nn.functional.cosine_similarity(mine, reference, dim=0) > 0.995
    assert mine.norm() == pytest.approx(float(reference.norm()), rel=0.03)


@torch.no_grad()
def test_what_wants_no_gradient_reads_the_weights_as_they_are_stored() -> None:
    model, twin = (attached("bert", "classify", Full(), each) for each in (torch.bfloat16, torch.float32))
    with mixed_precision(model):
        y = classify_logits(model.eval(), rows())
    assert torch.equal(y, classify_logits(twin.eval(), rows()))


def test_an_adapter_is_left_to_its_bases_precision() -> None:
    model = attached("bert", "classify", LoRA(r=2, lora_dropout=0.0))
    with mixed_precision(model):
        assert not torch.is_autocast_enabled("cpu")
    with mixed_precision(attached("bert", "classify", Full())):
        assert torch.is_autocast_enabled("cpu")
