"""The faster attention gives the reference's outputs and gradients: grouped heads, every shape of bias, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from turret.ops import attention as module
from turret.ops.attention import attend, attend_plainly
from turret.ops.structs import DropoutArguments

BIASES = {"none": None, "padding": (2, 1, 1, 9), "causal": (1, 1, 5, 9), "position": (1, 6, 5, 9), "all": (2, 6, 5, 9)}


def tensors(kv_heads: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 5, 6, 8, generator=generator).transpose(1, 2)  # as a model hands it over: (B, H, T, D), strided
    k, v = (torch.randn(2, kv_heads, 9, 8, generator=generator) for _ in range(2))
    return tuple(each.to(dtype).requires_grad_() for each in (q, k, v))  # type: ignore[return-value]


def run(function: Any, inputs: tuple[Tensor, Tensor, Tensor], *rest: Any) -> tuple[Tensor, ...]:
    output = function(*inputs, *rest)
    weights = torch.arange(output.numel(), dtype=output.dtype).view(output.shape).cos()
    return output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES.keys())
def test_it_equals_the_plain_way_with_its_gradients(kv_heads: int, shape: tuple[int, ...] | None) -> None:
    bias = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(2))
    inputs = tensors(kv_heads)
    fast, plain = run(attend, inputs, bias, 0.3), run(attend_plainly, inputs, bias, 0.3)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)
    twisted = run(attend_plainly, inputs, bias, 0.31)  # the control: another scale is noticed
    assert not torch.allclose(fast[0], twisted[0], atol=2e-6, rtol=2e-5)


def test_dropout_is_the_formula_with_the_mask_it_drew_forward_and_backward() -> None:
    inputs, dropped = tensors(2), DropoutArguments.of(0.4, 5, torch.arange(10).view(2, 5))
    fast = run(lambda *each: attend(*each, None, 0.3, dropped), inputs)
    plain = run(lambda *each: attend_plainly(*each, None, 0.3, dropped), inputs)
    keep = dropped.keep_mask(torch.Size((2, 6, 5, 9)))

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
        P = (0.3 * q @ k.mT).softmax(-1)
        return (P * keep / 0.6) @ v

    for ours, theirs, wanted in zip(fast, plain, run(formula, inputs), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(theirs, wanted, atol=1e-5, rtol=1e-4)
    assert 0.2 < (~keep).float().mean() < 0.6


def test_a_bias_that_is_trained_and_very_long_rows_take_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(module, "attend_plainly", lambda *each: taken.append(1) or attend_plainly(*each))
    inputs = tensors(6)
    bias = torch.zeros(1, 6, 5, 9, requires_grad=True)
    attend(*inputs, bias, 0.3).sum().backward()
    assert taken
    assert bias.grad is not None
    monkeypatch.setattr(module, "LARGEST", 10)
    attend(*inputs, None, 0.3)
    assert len(taken) == 2
    with torch.no_grad():
        attend(*inputs, None, 0.3)
    assert len(taken) == 3


def test_bfloat16_is_as_close_to_float32_as_the_plain_way_is() -> None:
    exact = run(attend_plainly, tensors(2), None, 0.3)
    half = tensors(2, torch.bfloat16)
    fast, plain = run(attend, half, None, 0.3), run(attend_plainly, half, None, 0.3)
    for true, ours, theirs in zip(exact, fast, plain, strict=True):
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + 1e-2
