"""LoRA on frozen layers: its formula, and layers with one input and their LoRA as one operation.

y = W x + b + scale (drop(x) A^T) B^T        (Hu et al. 2021)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from turret.ops.autograd import FunctionContext, apply
from turret.ops.autograd import Gradients as AllGradients
from turret.ops.core import REFERENCE, Gradients, Ops, enabled
from turret.ops.dropout import HashedMask, Masks
from turret.ops.structs import BaseProducts, Group, Lora, Matrix
from turret.ops.table import of


def lora_delta(x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`scaling * B A x`: what LoRA adds to `W x`, after dropout of x; the reference of every faster path.

    Args:
        x: (..., D_in).
        A: (R, D_in).
        B: (D_out, R).
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.

    Returns:
        (..., D_out).

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    return low_rank(x, A, B.mT, scaling)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """`scaling * (x A^T) B`. x: (..., D_in), A: (R, D_in), B: (R, D_out) -> (..., D_out)."""
    h = x @ A.mT  # (..., R)
    return (h if scaling == 1.0 else h * scaling) @ B  # the smallest tensor is scaled


# --- a group of layers ------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    """y (N, D_out) of each layer of a group, and what LoRA's backward pass needs."""

    y: list[Tensor]
    inner: list[Tensor]


def forward(ops: Ops, group: Group, x: Tensor, plus: Tensor | None = None) -> Forward:
    """W x + b + LoRA's part + plus, of each layer. x: (N, D_in)."""
    y = [each.base.forward(x, each.weight, each.bias) for each in group]
    return Forward(y, ops.add_lora(y, x, [each.lora for each in group], plus))


def backward(
    ops: Ops, group: Group, x: Callable[[], Tensor], inner: Sequence[Tensor], dy: Sequence[Tensor], wanted: bool = True
) -> tuple[Tensor | None, Gradients]:
    """(dx (N, D_in), dA and dB of every LoRA).

    Args:
        ops: those of the forward pass.
        group: likewise.
        x: gives the input; called only if a layer has a LoRA.
        inner: from the forward pass.
        dy: (N, D_out) of each layer.
        wanted: whether dx is needed.
    """
    dx: Tensor | None = None
    for each, own in zip(group, dy, strict=True) if wanted else ():
        dx = each.base.backward(own, each.weight, dx)
    return dx, ops.lora_backward([each.lora for each in group], x, inner, dy, dx)


def factors(groups: Iterable[Group]) -> list[Tensor]:
    """A and B of every LoRA, in the order of `backward`."""
    return [each for group in groups for m in group if m.lora is not None for each in (m.lora.A, m.lora.B)]


def hashed(ops: Ops, lora: Lora, masks: Masks, keys: Callable[[], Tensor]) -> Lora:
    """The LoRA with the next mask of a pass. keys: of the tokens of its input."""
    dropped = masks.arguments(lora.p, keys)
    return lora._replace(mask=HashedMask(ops, dropped)) if dropped.threshold else lora


# --- one layer --------------------------------------------------------------------------------------------------------


class _AdaptedContext(FunctionContext, Protocol):
    ops: Ops
    group: Group


class _Adapted(torch.autograd.Function):
    """One layer and its LoRA. x: (..., D_in) -> (..., D_out). A and B are arguments for autograd to see."""

    @staticmethod
    def forward(ctx: _AdaptedContext, ops: Ops, matrix: Matrix, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        (y,), inner = forward(ops, (matrix,), x.reshape(-1, x.shape[-1]))
        ctx.ops, ctx.group = ops, (matrix,)
        ctx.save_for_backward(x, *inner)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _AdaptedContext, *gradients: Tensor) -> AllGradients:
        x, *inner = ctx.saved_tensors
        dy = gradients[0].reshape(-1, gradients[0].shape[-1]).contiguous()
        rows = x.reshape(-1, x.shape[-1])
        dx, own = backward(ctx.ops, ctx.group, lambda: rows, inner, [dy], ctx.needs_input_grad[2])
        return None, None, None if dx is None else dx.view(x.shape), *own


def adapted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base: BaseProducts,
    lora: Lora,
    masks: Masks,
    stream: str | None,
) -> Tensor | None:
    """A frozen layer and its LoRA, with little saved for the backward pass; None if torch must compute them.

    Args:
        x: (..., D_in).
        weight: of the layer, in any form that `base` takes.
        bias: (D_out,) or None.
        base: the products of the weight.
        lora: without a mask.
        masks: of the pass.
        stream: whose tokens x has.
    """
    ops = of(x)
    if not (ops.kernels and x.is_contiguous() and enabled("lora_kernel") and ops.takes_lora([lora])):
        if not enabled("lora_gradient"):
            return None
        ops = REFERENCE
    own = hashed(of(x), lora, masks, lambda: masks.keys_of(x, stream))
    return apply(_Adapted, ops, Matrix(weight, bias, base, own), x, lora.A, lora.B)
