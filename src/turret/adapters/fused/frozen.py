"""A frozen linear layer on few tokens: a decoding step, or a short text.

y = x W^T + b. A general library packs W again at every call, which pays only for hundreds of tokens. The kernel reads W
once, in place, and adds each token's adapter before rounding. A token's output does not depend on the other tokens of
the pass, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turret.adapters.fused import enabled
from turret.ops.cpu import AdapterSpans, usable


def linear(
    layer: nn.Module, x: Tensor, spans: AdapterSpans | None = None, number: int = 0, *, helped: bool = True
) -> Tensor:
    """layer(x), by the kernel if the tokens are few and no gradient is needed. x: (..., D_in) -> (..., D_out).

    Args:
        layer: a frozen linear layer.
        x: tokens.
        spans: the adapters of a pass; needs kernels.
        number: the layer's index in `spans`.
        helped: whether helper threads may be awake; if not, a small product is not worth waking them.
    """
    if plain(layer) and not torch.is_grad_enabled() and enabled("frozen_linear"):
        assert isinstance(layer, nn.Linear)
        weight, bias = layer.weight, layer.bias
        library = usable(x, weight) if bias is None else usable(x, weight, bias)
        few = library is not None and 0 < x.numel() <= library.few(x.dtype) * x.shape[-1]
        if library is not None and few and weight.is_contiguous() and x.is_contiguous():
            return library.linear(x, weight, bias, spans, number, helped=helped)
    y: Tensor = layer(x)
    if spans is not None:
        library = usable(x, y)
        assert library is not None
        y = y.contiguous()
        library.low_rank(spans, number, x.contiguous(), y)
    return y


def plain(layer: nn.Module) -> bool:
    """Whether calling the layer is a product and nothing else: no subclass, no hooks, no replaced forward."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not hooked
