"""RMS norms of the base, with less saved for the backward pass.

    y = w n,    n = x r,    r = 1 / sqrt(mean(x^2) + eps),    over the last dimension, in float32

(Zhang & Sennrich 2019.) Autograd saves several float32 copies of x. Here x itself and r are saved, and n is computed
again. An operation that reads y need not save it either: `to_save` gives it x and the norm, and `restored` computes y
again. Without gradients the outputs equal the base's bit for bit; with gradients, and in an engine, they are close.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret import card_kernels
from turret.adapters.autograd import FunctionContext, Gradients, apply
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled
from turret.kernels import Library, usable

COMPUTED_FROM = "turret_computed_from"  # an attribute of a norm's output


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The formula in torch's own operations, in the order of transformers: the reference of the fast path.

    dtype: of n; T5 takes its weight's where that is narrower than x's, the others x's.
    """
    wide = x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * n.to(dtype)


class RecomputedNorm(Protocol):
    """A norm with frozen weights that computes its output again, bit for bit."""

    def of(self, x: Tensor) -> Tensor:
        """The norm's output, from the input that the norm saves anyway."""


class RecomputedRMSNorm(NamedTuple):
    weight: Tensor
    eps: float
    library: Library

    def of(self, x: Tensor) -> Tensor:
        return self.library.rms_norm(x, self.weight, self.eps)[0]


def with_input(y: Tensor, x: Tensor, norm: RecomputedNorm) -> Tensor:
    """y, a norm's output, with the norm and its input attached for `to_save`."""
    setattr(y, COMPUTED_FROM, (y._version, x.detach(), norm))
    return y


def to_save(y: Tensor) -> tuple[Tensor, RecomputedNorm | None]:
    """The tensor to save for a backward pass that needs y: y itself, or the input of the norm that computed y."""
    version, x, norm = getattr(y, COMPUTED_FROM, (None, y, None))
    return (x, norm) if version == y._version and enabled("norm_inputs") else (y, None)  # y may have been changed


def restored(saved: Tensor, norm: RecomputedNorm | None) -> Tensor:
    """y, from the result of `to_save`."""
    return saved if norm is None else norm.of(saved)


class _RMSNormContext(FunctionContext, Protocol):
    library: Library | None


class _RMSNorm(torch.autograd.Function):
    """dx = r (g - n mean(g n)),  g = w dy."""

    @staticmethod
    def forward(ctx: _RMSNormContext, x: Tensor, weight: Tensor, eps: float, library: Library | None) -> Tensor:
        ctx.library = library
        if library is not None:
            y, r = library.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, r, weight)
            return y
        wide = x.float()
        r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, r, weight)
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    def backward(ctx: _RMSNormContext, *gradients: Tensor) -> Gradients:
        x, r, weight = ctx.saved_tensors
        if ctx.library is not None:
            return ctx.library.rms_norm_backward(x, weight, r, gradients[0].contiguous()), None, None, None
        g = (gradients[0] * weight).float()
        n = x.float() * r
        g.sub_(n.mul_((g * n).mean(-1, keepdim=True))).mul_(r)
        return g.to(x.dtype), None, None, None


class _CardNorm(torch.autograd.Function):
    """The same on a card, in one launch each way; r is computed again."""

    @staticmethod
    def forward(ctx: _CardNormContext, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: (N, D)."""
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        y: Tensor = torch.ops.turret.rms_norm(x, weight, eps)
        return y

    @staticmethod
    def backward(ctx: _CardNormContext, *gradients: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        return torch.ops.turret.rms_norm_backward(x, weight, ctx.eps, gradients[0].contiguous(), None), None, None


class _CardNormContext(FunctionContext, Protocol):
    eps: float


class FrozenNorm(nn.Module):
    """Replaces an RMS norm of the base, with the same weight.

    narrows: if its weight is 16 bits wide, it gives that dtype whatever the dtype of its input (T5).
    """

    def __init__(self, replaced: nn.Module, context: BatchContext, narrows: bool = False) -> None:
        super().__init__()
        self.context = context
        self.weight = replaced.get_parameter("weight")
        self.variance_epsilon: float = vars(replaced)["variance_epsilon"]
        self.narrows = narrows

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        if not x.is_cpu and not weight.requires_grad and x.numel() > 0 and card_kernels.usable(x, weight):
            rows = x.reshape(-1, x.shape[-1])
            return apply(_CardNorm, rows, weight, self.variance_epsilon).view(x.shape)
        trains = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
        if trains and weight.dtype == x.dtype and enabled("rms_norm"):
            library = usable(x, weight)
            x = x if library is None else x.contiguous()
            y = apply(_RMSNorm, x, weight, self.variance_epsilon, library)
            if library is None:
                return y
            return with_input(y, x, RecomputedRMSNorm(weight, self.variance_epsilon, library))
        if self.context.serves and (library := usable(x, weight)) is not None and x.numel() > 0:
            return library.rms_norm(x.contiguous(), weight, self.variance_epsilon)[0]
        narrows = self.narrows and weight.dtype in (torch.float16, torch.bfloat16)
        return rms_norm(x, weight, self.variance_epsilon, weight.dtype if narrows else x.dtype)
