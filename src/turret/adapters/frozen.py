"""A frozen linear layer on the few tokens of a step of decoding, or of a short text.

y = x W^T + b. A general library packs W anew at every call, which pays for hundreds of tokens; the kernel reads W once
as it lies. Its rows do not depend on each other: a token's row is the same to the last bit in any company. Knows
tensors; refuses to know slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turret.kernels import usable


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), by the kernel where no gradient is wanted and the tokens are few. x: (..., D_in) -> (..., D_out)."""
    if _plain(layer) and not torch.is_grad_enabled():
        assert isinstance(layer, nn.Linear)
        weight, bias = layer.weight, layer.bias
        library = usable(x, weight) if bias is None else usable(x, weight, bias)
        few = library is not None and 0 < x.numel() <= library.few(x.dtype) * x.shape[-1]
        if library is not None and few and x.is_contiguous() and weight.is_contiguous():
            return library.linear(x, weight, bias)
    y: Tensor = layer(x)
    return y


def _plain(layer: nn.Module) -> bool:
    """Whether calling it is a product and nothing else: no subclass, no hooks, no forward of its own."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not hooked
