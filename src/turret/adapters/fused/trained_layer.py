"""What `layers.TrainedEncoder` and `trained_decoder` share: layers that train as one operation of autograd.

On short texts the dozen modules of a layer, and what autograd saves for each, take as long as their arithmetic. Here
the same kernels are called without modules between them, forward and backward, in the modules' order, with their random
words and their rounding. So the numbers equal the modules' bit for bit. This file has the frozen matrices with their
LoRA factors, and the checks that a layer contains nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled, int8
from turret.adapters.fused.dropout import Masks
from turret.adapters.lora import KernelProducts, LoRAFactors, RoutedLinear
from turret.ops.cpu import DropoutArguments, Library

Linears = list[tuple[nn.Linear, LoRAFactors | None]]  # each frozen layer, and the factors that the slot adds to it


class TrainedMatrix(NamedTuple):
    """A frozen linear layer, and its LoRA: the products, and the place of A and B among the operation's tensors."""

    weight: Tensor
    bias: Tensor | None
    lora: KernelProducts | None = None
    place: int = 0  # of A; B is the next

    @property
    def adapted(self) -> bool:
        return self.lora is not None


class LayerArguments:
    """Collects a layer's matrices and dropout masks for one pass, in the order in which its modules draw at random.

    tensors: A (R, D_in) and B (D_out, R) of every adapted matrix so far.
    """

    def __init__(self, library: Library, context: BatchContext) -> None:
        self._library, self._masks = library, context.masks or Masks()
        self.tensors: list[Tensor] = []

    def dropped(self, p: float) -> DropoutArguments:
        return self._masks.arguments(p)

    def matrix(self, layer: nn.Linear, factors: LoRAFactors | None) -> TrainedMatrix:
        if factors is None:
            return TrainedMatrix(layer.weight, layer.bias)
        dropped = self.dropped(factors.dropout if factors.training else 0.0)
        self.tensors += [factors.lora_A, factors.lora_B]
        lora = KernelProducts(factors.scaling, dropped, self._library)
        return TrainedMatrix(layer.weight, layer.bias, lora, len(self.tensors) - 2)


class Matrices:
    """The matrices of one pass: y = W x + b + scale (drop(x) A^T) B^T, and its gradients. Holds no activations."""

    def __init__(self, context: BatchContext, each: Sequence[TrainedMatrix]) -> None:
        self.each, self._context = each, context
        self._products = [int8.FrozenProducts()] * len(each)

    @property
    def factors(self) -> int:
        """How many tensors the factors of the adapted matrices are."""
        return 2 * sum(one.adapted for one in self.each)

    def forward(self, i: int, x: Tensor, tensors: Sequence[Tensor], inner: list[Tensor]) -> Tensor:
        """(N, D_in) -> (N, D_out). inner: collects drop(x) A^T of every adapted matrix."""
        weight, bias, lora, place = self.each[i]
        self._products[i] = int8.products(self._context, x, weight, bias)
        y = self._products[i].forward(x, weight, bias)
        if lora is not None:
            inner.append(lora.forward(x, tensors[place], tensors[place + 1], y))
        return y

    def frozen(self, i: int, x: Tensor) -> Tensor:
        """W x + b, computed again."""
        weight, bias, *_ = self.each[i]
        return self._products[i].forward(x, weight, bias)

    def cheap(self, i: int) -> bool:
        """Whether `frozen` costs little."""
        return self._products[i].cheap

    def input_gradient(self, i: int, dy: Tensor, x: Callable[[], Tensor], back: Back) -> Tensor:
        """dx (N, D_in). x: gives the matrix's input; called only if LoRA needs it."""
        dx = self._products[i].backward(dy, self.each[i].weight)
        self.factor_gradients(i, dy, x, back, dx)
        return dx

    def factor_gradients(
        self, i: int, dy: Tensor, x: Callable[[], Tensor], back: Back, dx: Tensor | None = None
    ) -> None:
        """Put the gradients of LoRA's factors into `back`, and add LoRA's part to dx."""
        _, _, lora, place = self.each[i]
        if lora is not None:
            A, B = back.tensors[place : place + 2]
            back.gradients[place : place + 2] = lora.backward(x(), A, B, back.inner[place // 2], dy, dx)

    def input_gradient_of_both(self, i: int, j: int, dy: tuple[Tensor, Tensor]) -> Tensor:
        """dx of two frozen matrices with one input."""
        return self._products[i].backward_both(dy, (self.each[i].weight, self.each[j].weight))


class Back(NamedTuple):
    """A backward pass: the operation's tensors, drop(x) A^T of the adapted matrices, and the gradients so far."""

    tensors: Sequence[Tensor]
    inner: Sequence[Tensor]
    gradients: list[Tensor | None]  # of each tensor


def trains_one_adapter(context: BatchContext) -> bool:
    """Whether this pass trains one adapter on unpadded rows, and layers may be one operation."""
    if not enabled("trained_layer") or context.serves or context.cache is not None or context.capture is not None:
        return False
    return context.lengths is not None and context.single() is not None and not torch.is_autocast_enabled("cpu")


def linears_of(modules: Iterable[nn.Module], slot: int) -> Linears | None:
    """Linear layers with the factors that this slot adds to them, or None if one is anything else."""
    found: Linears = []
    for each in modules:
        base, factors = each, None
        if type(each) is RoutedLinear:
            if has_hooks(each):
                return None
            base, factors = each.base_layer, each.factors(slot)
        if type(base) is not nn.Linear or not base.weight.is_contiguous() or has_hooks(base):
            return None
        if not isinstance(vars(base).get("forward"), int8.Forward | None):
            return None
        if factors is not None and not factors.by_kernels(base.weight):
            return None
        found.append((base, factors))
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module also calls a hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
