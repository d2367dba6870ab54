"""The end of a half of an encoder's layer as one operation: dropout, the sum with what went in, LayerNorm.

    s = dropout(W h + bias) + x,    y = w (s - mean(s)) / sqrt(var(s) + eps) + b        (Ba et al. 2016)

Written out it is three operations and three more on the way back, each one pass over memory; here one and one, with s
alone kept, which LayerNorm keeps anyway. If a classifier reads one token a row (`BatchContext.read`), the last layer
goes on with these tokens alone after its attention: nobody reads what the others would become.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.dropout import Masks
from turret.adapters.fused.norms import marked
from turret.kernels import LARGEST, NO_DROPOUT, DropoutArguments, Library, usable


class _AddedNorm(torch.autograd.Function):
    """y = LayerNorm(s), s = dropout(a) + x, with frozen weights: (y, s, stats of s). a, x: (..., D)."""

    @staticmethod
    def forward(
        ctx: Any,
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
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        s, weight, stats = ctx.saved_tensors
        da, dx = ctx.library.added_norm_backward(s, weight, stats, ctx.dropped, gradients[0].contiguous())
        return da, dx, None, None, None, None, None


class LayerNormAgain(NamedTuple):
    weight: Tensor
    bias: Tensor
    stats: Tensor
    library: Library

    def of(self, s: Tensor) -> Tensor:
        return self.library.added_norm_again(s, self.weight, self.bias, self.stats)


class FrozenOutput(nn.Module):
    """In place of the base's own dense, dropout and LayerNorm, with the very same layers under the very same names.

    narrows: it ends the attention of the last layer, so the tokens of `BatchContext.read` alone need to go on.
    """

    def __init__(self, replaced: Any, context: BatchContext, narrows: bool) -> None:
        super().__init__()
        self.dense: nn.Module = replaced.dense
        self.LayerNorm: nn.LayerNorm = replaced.LayerNorm
        self.dropout: nn.Dropout = replaced.dropout
        self.context, self.narrows = context, narrows

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if self.narrows and self.context.read is not None:  # (1, N, D) -> (1, B, D)
            hidden_states, input_tensor = (x.index_select(1, self.context.read) for x in (hidden_states, input_tensor))
        a, x, norm = self.dense(hidden_states), input_tensor, self.LayerNorm
        library = self._kernels(a, x)
        if library is None:
            plain: Tensor = norm(self.dropout(a) + x)
            return plain
        p = self.dropout.p if self.dropout.training else 0.0
        dropped = (self.context.masks or Masks()).dropped(p) if p > 0.0 else NO_DROPOUT
        if not torch.is_grad_enabled():
            return library.added_norm(a.contiguous(), x.contiguous(), norm.weight, norm.bias, norm.eps, dropped)[0]
        y, s, stats = _AddedNorm.apply(  # type: ignore[no-untyped-call]
            a.contiguous(), x.contiguous(), norm.weight, norm.bias, norm.eps, dropped, library
        )
        return marked(y, s, LayerNormAgain(norm.weight, norm.bias, stats, library))

    def _kernels(self, a: Tensor, x: Tensor) -> Library | None:
        """The kernels, in an engine and where there is a gradient to be computed through frozen weights."""
        norm = self.LayerNorm
        trains = torch.is_grad_enabled() and (a.requires_grad or x.requires_grad) and not norm.weight.requires_grad
        wanted = trains or (self.context.serves and not torch.is_grad_enabled())
        if not wanted or a.numel() >= LARGEST or not enabled("added_norm"):
            return None
        return usable(a, x, norm.weight, norm.bias)


def narrowing(last_attention: str) -> str:
    """The path of what ends the attention whose own path is given."""
    return f"{last_attention.rpartition('.')[0]}.output"
