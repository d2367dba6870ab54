"""Dropout, residual sum and LayerNorm as one operation equal the three; leaving tokens out changes no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import build
from torch import Tensor

from turret.adapters import attach, attachment, classify_logits, detach, trainable_parameters
from turret.adapters.layers import NarrowedOutput
from turret.families import family_of
from turret.methods import Full, LoRA, Method, Prefix
from turret.ops.cpu.compiled import library
from turret.ops.structs import NO_DROPOUT, DropoutArguments, LayerNorm
from turret.ops.table import ops_for, without

METHODS: tuple[Method, ...] = (
    LoRA(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0),
    Prefix(num_virtual_tokens=3),
)


@pytest.mark.skipif(library() is None, reason="no kernels on this machine")
@pytest.mark.parametrize("width", [37, 200, 384])
def test_what_is_dropped_is_dropped_on_the_way_back_too(width: int) -> None:
    """Against the three operations in float64, with the mask that the dropout kernel computes from these seeds."""
    found, dropped = library(), DropoutArguments.of(0.3, 123, torch.arange(11))
    assert found is not None
    a, x, weight, bias = torch.randn(11, width), torch.randn(11, width), torch.rand(width), torch.randn(width)
    mask = found.dropout(torch.ones(11, width), dropped, dropped.scale).double()
    assert 0.5 < float((mask > 0).double().mean()) < 0.9
    wide = [each.double().requires_grad_() for each in (a, x)]
    expected = torch.nn.functional.layer_norm(wide[0] * mask + wide[1], (width,), weight.double(), bias.double(), 1e-12)
    ops, norm = ops_for(a), LayerNorm(weight, bias, 1e-12, dropped)
    y, s, stats = ops.added_norm(a, x, norm)
    assert torch.equal(ops.added_norm_again(s, norm, stats), y)
    dy = torch.randn(11, width)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(expected, wide, dy.double())
    for mine, theirs in zip(ops.added_norm_backward(s, norm, stats, dy), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=2e-5)
    plain, *_ = ops.added_norm(a, x, norm._replace(dropped=NO_DROPOUT))
    assert not torch.allclose(y, plain, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_end_of_the_last_attention_is_replaced_and_comes_back(family: str) -> None:
    model = build(family, "classify")
    outputs = family_of(model.config).fast.added_norms
    own = {path: module for path, module in model.named_modules() if type(module).__name__ in outputs}
    names = {name for name, _ in model.named_parameters() if ".output." in name}
    attach(model, Prefix(num_virtual_tokens=2))
    assert own
    replaced = [isinstance(model.get_submodule(path), NarrowedOutput) for path in own]
    assert replaced == [*[False] * (len(own) - 2), True, False]
    assert names
    assert names <= {name for name, _ in model.named_parameters()}
    detach(model)
    assert all(model.get_submodule(path) is module for path, module in own.items())


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_last_layer_of_the_tokens_that_are_read_is_all_of_the_answer_and_of_the_gradient(
    family: str, method: Method, kernels: bool
) -> None:
    model = attach(build(family, "classify"), method, generator=torch.Generator().manual_seed(1)).eval()
    rows = [torch.tensor([2, 5, 6, 7, 8, 9, 3]), torch.tensor([2, 3]), torch.tensor([2, *range(5, 40), 3])]
    widths: list[int] = []
    body = model.base_model.encoder.layer[-1]
    body.register_forward_hook(lambda *call: widths.append(call[2].shape[1]))

    def outcome() -> tuple[Tensor, list[Tensor]]:
        logits = classify_logits(model, rows)
        trained = list(trainable_parameters(model).values())
        return logits, list(torch.autograd.grad(logits.square().sum(), trained, allow_unused=True))

    def both() -> tuple[Any, Any]:
        attached = attachment(model)
        assert attached.narrows
        narrow = outcome()
        attached.narrows = False
        return narrow, outcome()

    if kernels:
        narrow, whole = both()
    else:
        with without("kernels"):
            narrow, whole = both()
    assert widths[0] == len(rows)
    assert widths[1] > sum(map(len, rows))
    torch.testing.assert_close(narrow[0], whole[0], atol=1e-5, rtol=1e-5)
    for given, wanted in zip(narrow[1], whole[1], strict=True):
        assert (given is None) == (wanted is None)
        if given is not None:
            torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    model = attach(build("bert", "classify"), Full()).train()
    classify_logits(model, [torch.tensor([2, 5, 6, 3])]).square().sum().backward()
    assert all(each.grad is not None for name, each in model.named_parameters() if "output.LayerNorm" in name)
