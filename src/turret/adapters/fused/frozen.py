"""A frozen linear layer on the few tokens of a step of decoding, or of a short text.

y = x W^T + b. A general library packs W anew at every call, which pays for hundreds of tokens; the kernel reads W once
as it lies, and adds what the adapter of each token says before it rounds. Rows do not depend on each other: a token's
is the same to the last bit in any company. Knows tensors; refuses to know slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turret.adapters.fused import enabled
from turret.kernels import AdapterSpans, usable


def linear(
    layer: nn.Module, x: Tensor, spans: AdapterSpans | None = None, number: int = 0, *, helped: bool = True
) -> Tensor:
    """layer(x), by the kernel where no gradient is wanted and the tokens are few. x: (..., D_in) -> (..., D_out).

    spans: the adapters of a pass, of which the layer takes the factors of its `number`; only where there are kernels.
    helped: whether the threads beside may be awake; where not, a small product is not worth waking them.
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
    """Whether calling it is a product and nothing else: no subclass, no hooks, no forward of its own."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not hooked
