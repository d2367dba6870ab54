"""The LoRA kernels of training equal the formula and its gradients in float64, for all sizes and numbers of threads."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import BOTH, close, compiled, draw, needed
from torch import Tensor

from turret.ops.structs import NO_DROPOUT, DropoutArguments, Lora

Numbers = tuple[Tensor, ...]
BY = 1.7


def half(seed: int, tokens: int) -> DropoutArguments:
    return DropoutArguments.of(0.5, seed, torch.arange(tokens))


def drawn(tokens: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype) -> Numbers:
    """x, A, B, y before the call, dy, dx before the call."""
    torch.manual_seed(tokens)
    sizes = ((tokens, d_in), (tokens, d_out), (tokens, d_out), (tokens, d_in))
    x, y, dy, dx = (draw(*size, dtype=dtype) for size in sizes)
    return x, draw(rank, d_in) * d_in**-0.5, draw(d_out, rank), y, dy, dx


def ours(numbers: Numbers, dropped: DropoutArguments, *, wanted: bool = True) -> Numbers:
    """y, dx, dA, dB"""
    x, A, B, y, dy, dx = (each.clone() for each in numbers)
    ops, loras = compiled(x.dtype), [Lora(A, B, BY / dropped.scale, dropped=dropped)]
    inner = ops.add_lora([y], x, loras)
    dA, dB = ops.lora_backward(loras, lambda: x, inner, [dy], dx if wanted else None)
    assert dA is not None
    assert dB is not None
    return y, dx, dA, dB


def plainly(numbers: Numbers, dropped: DropoutArguments) -> Numbers:
    x, A, B, y, dy, dx = (each.double() for each in numbers)
    ops, ones = compiled(numbers[0].dtype), torch.ones_like(numbers[0])
    mask = ops.dropout(ones, dropped, 1.0).double() if dropped.threshold else 1.0
    dh = BY * dy @ B
    return y + BY * (x * mask) @ A.mT @ B.mT, dx + (dh @ A) * mask, dh.mT @ (x * mask), BY * dy.mT @ (x * mask @ A.mT)


@needed
@BOTH
@pytest.mark.parametrize("drops", [False, True], ids=["kept", "dropped"])
@pytest.mark.parametrize("rank", [1, 3, 4, 8, 13, 32])
@pytest.mark.parametrize("sizes", [(37, 64, 96), (1, 32, 32), (64, 160, 384)])
def test_lora_and_its_gradients_are_the_formula(
    sizes: tuple[int, int, int], rank: int, drops: bool, dtype: torch.dtype
) -> None:
    numbers, dropped = drawn(*sizes, rank, dtype), half(12345, sizes[0]) if drops else NO_DROPOUT
    for given, expected in zip(ours(numbers, dropped), plainly(numbers, dropped), strict=True):
        scale = float(expected.abs().max())
        close(given / scale, expected / scale, dtype)


@needed
def test_control_another_mask_gives_another_result() -> None:
    """The control of the test above; equal seeds give equal masks."""
    numbers = drawn(37, 64, 96, 8, torch.float32)
    other = ours(numbers, half(12346, 37))
    for given, expected in zip(other, plainly(numbers, half(12345, 37)), strict=True):
        assert not torch.allclose(given.double(), expected, rtol=1e-2, atol=1e-2)


@needed
@BOTH
def test_without_dx_the_factors_gradients_are_the_same(dtype: torch.dtype) -> None:
    numbers = drawn(37, 64, 96, 8, dtype)
    _, _, *given = ours(numbers, half(12345, 37), wanted=False)
    _, _, *expected = ours(numbers, half(12345, 37))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@needed
@BOTH
@pytest.mark.parametrize("threads", [2, 3])
def test_results_are_bit_equal_for_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    numbers, given, kept = drawn(301, 128, 96, 9, dtype), [], torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            given.append(ours(numbers, half(12345, 301)))
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))


@needed
def test_a_nan_stays_in_its_own_row() -> None:
    x, A, B, y, dy, dx = drawn(5, 64, 32, 4, torch.float32)
    x[3, 7] = float("nan")
    given = ours((x, A, B, y, dy, dx), NO_DROPOUT)[0]
    assert given[3].isnan().all()
    assert given[[0, 1, 2, 4]].isfinite().all()
