"""The products of frozen matrices: on few tokens, and in the base's own precision.

    y = x W^T + b,  dx = dy W

On few tokens (a decoding step, a short text) a general library packs W again at every call, which pays only for
hundreds of tokens. The kernel reads W once, in place. A token's output does not depend on the other tokens of the pass,
bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from turret.ops.core import enabled
from turret.ops.table import of


def linear(layer: nn.Module, x: Tensor, *, helped: bool = True) -> Tensor:
    """layer(x), by the kernel if the tokens are few and no gradient is needed. x: (..., D_in) -> (..., D_out).

    helped: whether helper threads may be awake; if not, a small product is not worth waking them.
    """
    if takes_few(layer, x):
        return of(x).linear_few(x, layer.get_parameter("weight"), layer._parameters["bias"], helped)
    y: Tensor = layer(x)
    return y


def takes_few(layer: nn.Module, x: Tensor) -> bool:
    """Whether the kernel for few tokens computes layer(x)."""
    if torch.is_grad_enabled() or not plain(layer) or not enabled("frozen_linear"):
        return False
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    ops = of(x, weight) if bias is None else of(x, weight, bias)
    return 0 < x.numel() <= ops.few() * x.shape[-1] and weight.is_contiguous() and x.is_contiguous()


def plain(layer: nn.Module) -> bool:
    """Whether calling the layer is a product and nothing else: no subclass, no hooks, no replaced forward."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not hooked


class FrozenProducts(NamedTuple):
    """In the base's own precision: `structs.BaseProducts`."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    def backward(self, dy: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
        return dy @ weight if plus is None else plus.addmm_(dy, weight)
