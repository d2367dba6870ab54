"""A frozen layer by the kernel gives torch's numbers; where the kernel does not apply, torch itself computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from turret.ops.cpu import compiled as kernels
from turret.ops.lora import linear
from turret.ops.table import without

needed = pytest.mark.skipif(
    kernels.library() is None or not kernels.library().few,  # type: ignore[union-attr]
    reason="no kernel for few tokens on this machine",
)


class Counting(nn.Linear):
    """A linear layer that counts its calls by torch."""


def calls(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each product that torch computes."""
    found: list[Any] = []
    plain = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *inputs: found.append(inputs) or plain(*inputs))
    return found


@needed
def test_few_tokens_take_the_kernel_and_many_take_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, found = nn.Linear(48, 40), calls(nn.Linear(1, 1), monkeypatch)
    library = kernels.library()
    assert library is not None
    most = library.few
    with torch.inference_mode():
        few = torch.randn(1, most, 48)
        torch.testing.assert_close(linear(layer, few), few @ layer.weight.mT + layer.bias)
        assert not found
        many = torch.randn(1, most + 1, 48)
        torch.testing.assert_close(linear(layer, many), many @ layer.weight.mT + layer.bias)
    assert len(found) == 1


@needed
@pytest.mark.parametrize("why", ["gradient", "hook", "forward", "subclass", "strides", "other dtype", "nothing", "off"])
def test_whatever_is_not_a_plain_product_of_few_tokens_is_the_layers_own(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer: nn.Module = Counting(48, 40) if why == "subclass" else nn.Linear(48, 40)
    x, seen = torch.randn(3, 48), []
    if why == "hook":
        layer.register_forward_hook(lambda *call: seen.append(call))
    if why == "forward":
        layer.forward = lambda x: x + 1.0  # type: ignore[method-assign]
    if why == "strides":
        x = torch.randn(48, 3).mT
    if why == "nothing":
        x = x[:0]
    if why == "other dtype":
        layer, x = nn.Linear(48, 40, dtype=torch.float64), x.double()
    found = calls(layer, monkeypatch)
    with (
        torch.set_grad_enabled(why == "gradient"),
        without("kernels") if why == "off" else torch.autograd.profiler.record_function("on"),
    ):
        given = linear(layer, x)
    if why == "forward":
        assert torch.equal(given, x + 1.0)
        return
    assert len(found) == 1
    assert torch.equal(given, layer(x))
    assert bool(seen) == (why == "hook")
