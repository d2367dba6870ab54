"""The frozen layers of a training step in 8 bits: `train.int8`.

    y = x W^T + b,  dx = dy W:    x, dy and W as integers from -127 to 127 with a scale for each token and each output

A frozen layer needs no gradient of W, the one product that 8 bits spoil (Wortsman et al. 2023, "SwitchBack"). The
adapter stays float32. Without gradients the base computes in its own precision, so an evaluation scores what will be
served. The base keeps its weights: they are rounded at every product, or once if the base is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret.adapters.autograd import FunctionContext, Gradients, apply
from turret.adapters.batch_context import BatchContext, RoundedMatrix
from turret.errors import AdapterError
from turret.families import family_of
from turret.ops.cpu import LONGEST_INT8, Int8Matrix, Library, usable
from turret.ops.cpu import int8 as possible
from turret.transformer import Model

LEAST = 32  # tokens; with fewer, rounding the weights takes longer than it saves
SMALL = 32 << 20  # bytes of a base's rounded matrices, forward and backward; up to this size they are kept


class FrozenProducts(NamedTuple):
    """How a frozen matrix multiplies rows of tokens (N, D): by the kernels `int8`, else in its own precision.

    rounded: the matrices that are kept rounded; None if every product rounds its own.
    """

    int8: Library | None = None
    rounded: dict[tuple[int, bool], RoundedMatrix] | None = None

    @property
    def cheap(self) -> bool:
        """Whether computing a product again costs less than saving it."""
        return self.int8 is not None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b."""
        if self.int8 is None:
            return nn.functional.linear(x, weight, bias)
        return self.int8.linear_int8(x.contiguous(), self._matrix(self.int8, weight, False), bias)

    def backward(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy W."""
        if self.int8 is None:
            return dy @ weight
        return self.int8.linear_int8(dy.contiguous(), self._matrix(self.int8, weight, True), None, turned=True)

    def backward_both(self, dy: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Tensor:
        """dy[0] W[0] + dy[1] W[1]."""
        y = self.backward(dy[0], weights[0])
        return y.addmm_(dy[1], weights[1]) if self.int8 is None else y.add_(self.backward(dy[1], weights[1]))

    def _matrix(self, library: Library, weight: Tensor, turned: bool) -> Tensor | Int8Matrix:
        if self.rounded is None:
            return weight
        key = weight.data_ptr(), turned
        known = self.rounded.get(key)
        if known is None or known.version != weight._version:
            found = library.round_int8(weight, turned)
            known = self.rounded[key] = RoundedMatrix(weight.detach(), weight._version, found)
        return known.rounded


def products(context: BatchContext, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> FrozenProducts:
    """How a frozen matrix multiplies x (..., D) in this pass."""
    few = context.rounded is None and x.numel() < LEAST * x.shape[-1]
    if not context.int8 or few or not fits(weight):
        return FrozenProducts()
    return FrozenProducts(usable(x, weight) if bias is None else usable(x, weight, bias), context.rounded)


def fits(weight: Tensor) -> bool:
    """Whether the 8-bit kernels take a matrix of these sizes."""
    return all(size % 64 == 0 and size <= LONGEST_INT8 for size in weight.shape) and weight.is_contiguous()


def small(layers: list[nn.Linear]) -> bool:
    """Whether the matrices of these layers are kept rounded: for few tokens, rounding takes longer than the product."""
    return 2 * sum(each.weight.numel() for each in layers) <= SMALL


def rounded_bytes(context: BatchContext) -> int:
    """Bytes of the matrices that are kept rounded."""
    return 0 if context.rounded is None else sum(each.rounded.bytes.nbytes for each in context.rounded.values())


def int8_layers(model: Model) -> list[nn.Linear]:
    """The linear layers of a model's body that can multiply in 8 bits.

    Raises:
        AdapterError: there are none, or the machine has no such products.
    """
    if not possible():
        raise AdapterError(
            "this machine cannot multiply in 8 bits (it needs AVX-512 VNNI and a C compiler): leave train.int8 off"
        )
    if (device := next(model.parameters()).device).type != "cpu":
        raise AdapterError(f"train.int8 needs a CPU, and this base is on {device}: leave train.int8 off")
    skipped = family_of(model.config).beside_body
    linear = [(path, each) for path, each in model.named_modules() if type(each) is nn.Linear]
    layers = [each for path, each in linear if fits(each.weight) and path.split(".")[0] not in skipped]
    if not layers:
        raise AdapterError("no layer of this base has sizes that are multiples of 64: leave train.int8 off")
    return layers


class _LinearContext(FunctionContext, Protocol):
    products: FrozenProducts


class _Linear(torch.autograd.Function):
    """y = x W^T + b with frozen W and b. x: (..., D_in) -> (..., D_out)."""

    @staticmethod
    def forward(ctx: _LinearContext, x: Tensor, weight: Tensor, bias: Tensor | None, by: FrozenProducts) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.products = by
        return by.forward(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _LinearContext, *gradients: Tensor) -> Gradients:
        (weight,) = ctx.saved_tensors
        dy = gradients[0]
        dx = ctx.products.backward(dy.reshape(-1, dy.shape[-1]), weight)
        return dx.view(*dy.shape[:-1], -1), None, None, None


class Forward:
    """Replaces the forward of a frozen layer: in 8 bits while gradients are on."""

    def __init__(self, layer: nn.Linear, context: BatchContext) -> None:
        self._layer, self._context = layer, context

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        trains = torch.is_grad_enabled() and not weight.requires_grad
        by = products(self._context, x, weight, bias) if trains else FrozenProducts()
        return nn.functional.linear(x, weight, bias) if by.int8 is None else apply(_Linear, x, weight, bias, by)


def hook(layer: nn.Linear, context: BatchContext) -> Callable[[], None]:
    """Let one frozen layer multiply in 8 bits while gradients are on; returns a function that undoes it."""
    module: nn.Module = layer  # whose forward may be replaced
    module.forward = Forward(layer, context)
    return lambda: vars(layer).__delitem__("forward")
