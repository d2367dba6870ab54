"""RMS norms with frozen weights: the input is saved for the backward pass, and no float32 copy of it.

    y = w n,    n = x r,    r = 1 / sqrt(mean(x^2) + eps),    over the last dimension, in float32

Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from turret.ops.autograd import FunctionContext, Gradients, apply
from turret.ops.core import Ops, enabled
from turret.ops.structs import RMSNorm
from turret.ops.table import of


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The formula in torch's own operations, in the order of transformers: the reference of the fast path.

    dtype: of n; T5 takes its weight's where that is narrower than x's, the others x's.
    """
    wide = x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * n.to(dtype)


class _NormContext(FunctionContext, Protocol):
    ops: Ops
    eps: float


class _RMSNorm(torch.autograd.Function):
    """dx = r (g - n mean(g n)),  g = w dy."""

    @staticmethod
    def forward(ctx: _NormContext, x: Tensor, weight: Tensor, eps: float, ops: Ops) -> Tensor:
        y, r = ops.rms_norm(x, RMSNorm(weight, eps))
        ctx.save_for_backward(x, r, weight)
        ctx.ops, ctx.eps = ops, eps
        return y

    @staticmethod
    def backward(ctx: _NormContext, *gradients: Tensor) -> Gradients:
        x, r, weight = ctx.saved_tensors
        norm, dy = RMSNorm(weight, ctx.eps), gradients[0].contiguous()
        return ctx.ops.rms_norm_backward(x, norm, r, dy), None, None, None


def frozen_rms_norm(x: Tensor, weight: Tensor, eps: float, *, serves: bool, narrows: bool) -> Tensor:
    """An RMS norm of the base. Without gradients, outside an engine, its output equals the base's bit for bit.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean of the squares.
        serves: whether an engine computes: then kernels do what they can.
        narrows: if the weight is 16 bits wide, the output has its dtype, whatever the dtype of x (T5).
    """
    trains = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
    if trains and weight.dtype == x.dtype and enabled("rms_norm"):
        return apply(_RMSNorm, x.contiguous(), weight, eps, of(x, weight))
    ops = of(x, weight)
    faster = ops.kernels and (serves or not x.is_cpu) and not weight.requires_grad and x.numel() > 0
    if faster and not torch.is_grad_enabled():
        return ops.rms_norm(x.contiguous(), RMSNorm(weight, eps))[0]
    narrow = narrows and weight.dtype in (torch.float16, torch.bfloat16)
    return rms_norm(x, weight, eps, weight.dtype if narrow else x.dtype)
