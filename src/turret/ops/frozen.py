"""The products of frozen matrices: on few tokens, in the base's own precision, and in 8 bits (`train.int8`).

    y = x W^T + b,  dx = dy W

On few tokens (a decoding step, a short text) a general library packs W again at every call, which pays only for
hundreds of tokens. The kernel reads W once, in place. A token's output does not depend on the other tokens of the pass,
bit for bit.

In 8 bits x, dy and W are integers from -127 to 127 with a scale for each token and each output. A frozen layer needs
no gradient of W, the one product that 8 bits spoil (Wortsman et al. 2023, "SwitchBack"). The adapter stays float32.
Without gradients the base computes in its own precision, so an evaluation scores what will be served. The base keeps
its weights: they are rounded at every product, or once if the base is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret.ops.autograd import FunctionContext, Gradients, apply
from turret.ops.core import enabled
from turret.ops.cpu import LONGEST_INT8, Int8Matrix, Library
from turret.ops.structs import BaseProducts
from turret.ops.table import of

LEAST = 32  # tokens; with fewer, rounding the weights takes longer than it saves


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

    @property
    def cheap(self) -> bool:
        return False

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    def backward(self, dy: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
        return dy @ weight if plus is None else plus.addmm_(dy, weight)


class RoundedMatrix(NamedTuple):
    """A frozen matrix rounded to 8 bits.

    matrix: kept alive, so that its address stays its own. version: of its values when it was rounded.
    """

    matrix: Tensor
    version: int
    rounded: Int8Matrix


Rounded = dict[tuple[int, bool], RoundedMatrix]  # by address, and whether the matrix is turned


@dataclass(frozen=True)
class Int8Products:
    """In 8 bits: `structs.BaseProducts`. rounded: matrices that are kept; None if every product rounds its own."""

    library: Library
    rounded: Rounded | None = None
    cheap = True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.library.linear_int8(x.contiguous(), self._matrix(weight, False), bias)

    def backward(self, dy: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
        dx = self.library.linear_int8(dy.contiguous(), self._matrix(weight, True), None, turned=True)
        return dx if plus is None else plus.add_(dx)

    def _matrix(self, weight: Tensor, turned: bool) -> Tensor | Int8Matrix:
        if self.rounded is None:
            return weight
        key = weight.data_ptr(), turned
        known = self.rounded.get(key)
        if known is None or known.version != weight._version:
            found = self.library.round_int8(weight, turned)
            known = self.rounded[key] = RoundedMatrix(weight.detach(), weight._version, found)
        return known.rounded


class EightBits(NamedTuple):
    """That the frozen layers of a model multiply in 8 bits. rounded: as in `Int8Products`."""

    rounded: Rounded | None = None

    @property
    def bytes(self) -> int:
        """Of the matrices that are kept rounded."""
        return 0 if self.rounded is None else sum(each.rounded.bytes.nbytes for each in self.rounded.values())


def products(int8: EightBits | None, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> BaseProducts:
    """How a frozen matrix multiplies x (..., D) in a training step."""
    if int8 is None or not fits_int8(weight) or (int8.rounded is None and x.numel() < LEAST * x.shape[-1]):
        return FrozenProducts()
    library = (of(x, weight) if bias is None else of(x, weight, bias)).int8
    return FrozenProducts() if library is None else Int8Products(library, int8.rounded)


def fits_int8(weight: Tensor) -> bool:
    """Whether the 8-bit kernels take a matrix of these sizes."""
    return all(size % 64 == 0 and size <= LONGEST_INT8 for size in weight.shape) and weight.is_contiguous()


class _LinearContext(FunctionContext, Protocol):
    products: BaseProducts


class _Linear(torch.autograd.Function):
    """y = x W^T + b with frozen W and b. x: (..., D_in) -> (..., D_out)."""

    @staticmethod
    def forward(ctx: _LinearContext, x: Tensor, weight: Tensor, bias: Tensor | None, by: BaseProducts) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.products = by
        return by.forward(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _LinearContext, *gradients: Tensor) -> Gradients:
        (weight,) = ctx.saved_tensors
        dy = gradients[0]
        dx = ctx.products.backward(dy.reshape(-1, dy.shape[-1]), weight)
        return dx.view(*dy.shape[:-1], -1), None, None, None


class Int8Forward:
    """Replaces the forward of a frozen linear layer: in 8 bits while gradients are on."""

    def __init__(self, layer: nn.Linear, int8: EightBits) -> None:
        self._layer, self._int8 = layer, int8

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        trains = torch.is_grad_enabled() and not weight.requires_grad
        by = products(self._int8 if trains else None, x, weight, bias)
        return nn.functional.linear(x, weight, bias) if not by.cheap else apply(_Linear, x, weight, bias, by)
