"""The end of each half of an encoder layer as one operation: dropout, residual sum and LayerNorm.

    s = dropout(W h + bias) + x,    y = w (s - mean(s)) / sqrt(var(s) + eps) + b        (Ba et al. 2016)

In separate modules these are three passes over memory and three more backward; here one and one. Only s is saved, which
LayerNorm saves anyway. If a classifier reads one token of each row (`BatchContext.read`), the last layer computes only
these tokens after its attention.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret.adapters.autograd import Gradients, KernelContext, apply
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.dropout import Masks
from turret.adapters.fused.norms import with_input
from turret.adapters.whole import current
from turret.kernels import LARGEST, DropoutArguments, Library, usable


class _AddedNormContext(KernelContext, Protocol):
    dropped: DropoutArguments


class _AddedNorm(torch.autograd.Function):
    """y = LayerNorm(s), s = dropout(a) + x, with frozen weights: (y, s, stats of s). a, x: (..., D)."""

    @staticmethod
    def forward(
        ctx: _AddedNormContext,
        a: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropped: DropoutArguments,
        library: Library,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, s, stats = library.added_norm(a, x, weight, bias, eps, dropped)
        ctx.save_for_backward(s, weight, stats)
        ctx.mark_non_differentiable(s, stats)
        ctx.set_materialize_grads(False)
        ctx.dropped, ctx.library = dropped, library
        return y, s, stats

    @staticmethod
    def backward(ctx: _AddedNormContext, *gradients: Tensor) -> Gradients:
        s, weight, stats = ctx.saved_tensors
        da, dx = ctx.library.added_norm_backward(s, weight, stats, ctx.dropped, gradients[0].contiguous())
        return da, dx, None, None, None, None, None


class RecomputedLayerNorm(NamedTuple):
    weight: Tensor
    bias: Tensor
    stats: Tensor
    library: Library

    def of(self, s: Tensor) -> Tensor:
        return self.library.added_norm_again(s, self.weight, self.bias, self.stats)


class FrozenOutput(nn.Module):
    """Replaces the module of dense, dropout and LayerNorm; the base's own layers stay inside under the same names.

    narrows: it ends the attention of the last layer, so that only the tokens of `BatchContext.read` need to go on.
    """

    def __init__(self, replaced: nn.Module, context: BatchContext, narrows: bool) -> None:
        super().__init__()
        norm, dropout = replaced.get_submodule("LayerNorm"), replaced.get_submodule("dropout")
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(dropout, nn.Dropout)
        self.dense, self.LayerNorm, self.dropout = replaced.get_submodule("dense"), norm, dropout
        self.context, self.narrows = context, narrows

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if self.narrows and self.context.read is not None:  # (1, N, D) -> (1, B, D)
            hidden_states, input_tensor = (x.index_select(1, self.context.read) for x in (hidden_states, input_tensor))
        a, x, norm = self.dense(hidden_states), input_tensor, current(self.LayerNorm)
        library = self._kernels(a, x, norm) if isinstance(norm, nn.LayerNorm) else None
        if library is None or not isinstance(norm, nn.LayerNorm):
            y: Tensor = norm(self.dropout(a) + x)
            return y
        a, x = a.contiguous(), x.contiguous()
        p = self.dropout.p if self.dropout.training else 0.0
        dropped = (self.context.masks or Masks()).arguments(p)
        if not torch.is_grad_enabled():
            return library.added_norm(a, x, norm.weight, norm.bias, norm.eps, dropped)[0]
        y, s, stats = apply(_AddedNorm, a, x, norm.weight, norm.bias, norm.eps, dropped, library)
        return with_input(y, s, RecomputedLayerNorm(norm.weight, norm.bias, stats, library))

    def _kernels(self, a: Tensor, x: Tensor, norm: nn.LayerNorm) -> Library | None:
        """The kernels, in an engine and where a gradient passes through frozen weights."""
        trains = torch.is_grad_enabled() and (a.requires_grad or x.requires_grad) and not norm.weight.requires_grad
        wanted = trains or (self.context.serves and not torch.is_grad_enabled())
        if not wanted or a.numel() >= LARGEST or not enabled("added_norm"):
            return None
        return usable(a, x, norm.weight, norm.bias)


def narrowing(last_attention: str) -> str:
    """The path of the module that ends the attention at this path."""
    return f"{last_attention.rpartition('.')[0]}.output"
