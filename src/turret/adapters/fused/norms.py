"""The base's own RMS norms, with less kept for the backward pass. Knows tensors; refuses to know models.

    y = w n,    n = x r,    r = 1 / sqrt(mean(x^2) + eps),    over the last dimension, in float32

(Zhang & Sennrich 2019.) Autograd keeps several float32 copies of x for this; here x itself and r are kept, and n is
computed again. Nor need those who read y keep it: what it was made from goes along (`kept`).
Without gradients the outputs are the base's to the last bit; with them, and in an engine, nearly so.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled
from turret.kernels import Library, usable

MADE_FROM = "turret_made_from"  # an attribute of a norm's output


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The formula in torch's own operations, in the order of transformers: the reference of the fast way.

    dtype: of n; T5 takes its weight's where that is narrower than x's, the others x's.
    """
    wide = x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * n.to(dtype)


class Again(Protocol):
    """A norm with frozen weights, to be computed again to the last bit."""

    def of(self, x: Tensor) -> Tensor:
        """Its output, from what it keeps anyway."""


class RMSNormAgain(NamedTuple):
    weight: Tensor
    eps: float
    library: Library

    def of(self, x: Tensor) -> Tensor:
        return self.library.rms_norm(x, self.weight, self.eps)[0]


def marked(y: Tensor, x: Tensor, norm: Again) -> Tensor:
    """y, a norm's output, with what makes it again."""
    setattr(y, MADE_FROM, (y._version, x.detach(), norm))
    return y


def kept(y: Tensor) -> tuple[Tensor, Again | None]:
    """What to keep of y for a backward pass: (y, None), or of a norm's output (what the norm keeps itself, norm)."""
    version, x, norm = getattr(y, MADE_FROM, (None, y, None))
    return (
        (x, norm) if version == y._version and enabled("norm_inputs") else (y, None)
    )  # not if somebody has changed y since


def made(x: Tensor, norm: Again | None) -> Tensor:
    """y, of what `kept` gave."""
    return x if norm is None else norm.of(x)


class _RMSNorm(torch.autograd.Function):
    """dx = r (g - n mean(g n)),  g = w dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, library: Library | None) -> Tensor:
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
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, r, weight = ctx.saved_tensors
        if ctx.library is not None:
            return ctx.library.rms_norm_backward(x, weight, r, gradients[0].contiguous()), None, None, None
        g = (gradients[0] * weight).float()
        n = x.float() * r
        g.sub_(n.mul_((g * n).mean(-1, keepdim=True))).mul_(r)
        return g.to(x.dtype), None, None, None


class FrozenNorm(nn.Module):
    """In place of an RMS norm of the base, with the very same weight.

    narrows: it gives the dtype of its weight where that is 16 bits wide, whatever it is given.
    """

    def __init__(self, replaced: Any, context: BatchContext, narrows: bool = False) -> None:
        super().__init__()
        self.context = context
        self.weight: nn.Parameter = replaced.weight
        self.variance_epsilon: float = replaced.variance_epsilon
        self.narrows = narrows

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        trains = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
        if trains and weight.dtype == x.dtype and enabled("rms_norm"):
            library = usable(x, weight)
            x = x if library is None else x.contiguous()
            y: Tensor = _RMSNorm.apply(x, weight, self.variance_epsilon, library)  # type: ignore[no-untyped-call]
            return y if library is None else marked(y, x, RMSNormAgain(weight, self.variance_epsilon, library))
        if self.context.serves and (library := usable(x, weight)) is not None and x.numel() > 0:
            return library.rms_norm(x.contiguous(), weight, self.variance_epsilon)[0]
        narrows = self.narrows and weight.dtype in (torch.float16, torch.bfloat16)
        return rms_norm(x, weight, self.variance_epsilon, weight.dtype if narrows else x.dtype)
