"""The kernels of a CPU and the operations of a GPU give what the reference of each operation gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from turret.ops.core import REFERENCE, Ops
from turret.ops.cpu.compiled import library
from turret.ops.gpu.ops import ops_with
from turret.ops.structs import LayerNorm, Lora, RMSNorm
from turret.ops.table import ops_for

N, WIDE, NARROW = 9, 64, 32


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def rms_norm(ops: Ops) -> list[Tensor]:
    x, norm = draw(N, WIDE), RMSNorm(draw(WIDE), 1e-5)
    y, r = ops.rms_norm(x, norm)
    return [y, ops.rms_norm_backward(x, norm, r, draw(N, WIDE) + 1.0, draw(N, WIDE))]


def added_norm(ops: Ops) -> list[Tensor]:
    norm = LayerNorm(draw(WIDE), draw(WIDE) + 1.0, 1e-5)
    y, s, stats = ops.added_norm(draw(N, WIDE), draw(N + 1, WIDE)[1:].contiguous(), norm)
    return [y, s, ops.added_norm_again(s, norm, stats), *ops.added_norm_backward(s, norm, stats, draw(N, WIDE))]


def activations(ops: Ops) -> list[Tensor]:
    x, up, dy = draw(N, WIDE), draw(N, WIDE) + 1.0, draw(N, WIDE) - 1.0
    return [ops.gelu(x), ops.gelu_backward(x, dy), ops.swiglu(x, up), *ops.swiglu_backward(x, up, dy)]


def rotate(ops: Ops) -> list[Tensor]:
    """Both halves of a head have the same angles, as the bases' have."""
    q, k, angle = draw(N, 4, NARROW), draw(N, 2, NARROW), draw(N, NARROW // 2).repeat(1, 2)
    return [each for sign in (1.0, -1.0) for each in ops.rotate(q.clone(), k.clone(), angle.cos(), angle.sin(), sign)]


def lora(ops: Ops) -> list[Tensor]:
    """Two of three layers with one input have a LoRA; the sums that are changed in place are results too."""
    x, dy, dx, plus = draw(N, WIDE), [draw(N, NARROW) for _ in range(3)], draw(N, WIDE), draw(N, NARROW)
    loras = [Lora(draw(4, WIDE), draw(NARROW, 4), 0.5), None, Lora(draw(4, WIDE) + 1.0, draw(NARROW, 4), 0.5)]
    assert ops.takes_lora(loras)
    y = [draw(N, NARROW) for _ in range(3)]
    inner = ops.add_lora(y, x, loras, plus)
    gradients = ops.lora_backward(loras, lambda: x, inner, dy, dx)
    return [*y, dx, *(each for each in gradients if each is not None)]


EVERY = [rms_norm, added_norm, activations, rotate, lora]


def same(given: list[Tensor], wanted: list[Tensor]) -> bool:
    assert len(given) == len(wanted)
    return all(torch.allclose(one, other, atol=1e-4, rtol=1e-4) for one, other in zip(given, wanted, strict=True))


@pytest.mark.skipif(library() is None, reason="no kernels on this machine")
@pytest.mark.parametrize("operation", EVERY)
def test_the_kernels_of_a_cpu_give_the_references_numbers(operation: Callable[[Ops], list[Tensor]]) -> None:
    kernels = ops_for(torch.zeros(1))
    assert kernels.kernels
    assert same(operation(kernels), operation(REFERENCE))


@pytest.mark.parametrize("operation", EVERY)
def test_the_products_of_a_gpu_give_the_references_numbers(operation: Callable[[Ops], list[Tensor]]) -> None:
    assert same(operation(ops_with(frozenset())), operation(REFERENCE))


@pytest.mark.parametrize("operation", EVERY)
def test_a_wrong_number_is_noticed(operation: Callable[[Ops], list[Tensor]]) -> None:
    """The control: every result of every operation matters."""
    wanted = operation(REFERENCE)
    for place in range(len(wanted)):
        wrong = operation(REFERENCE)
        wrong[place] = wrong[place] * 1.01
        assert not same(wrong, wanted)
