"""What the layers share that train as one operation: `trained_encoder` and `trained_decoder`.

On short texts the dozen modules of a layer, and what autograd keeps of each, take as long as their arithmetic. There
the same kernels follow each other without them, forward and backward: in the modules' order, with their random words
and their roundings, so the numbers are theirs to the last bit. Here is what both do with a frozen matrix and LoRA's
factors beside it, and how they tell that a layer is made of nothing else. Refuses to know which layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled, int8
from turret.adapters.fused.dropout import Masks
from turret.adapters.lora import LoRAFactors, RoutedLinear
from turret.kernels import NO_DROPOUT, DropoutArguments, Library

Linears = list[tuple[nn.Linear, LoRAFactors | None]]  # each frozen layer, and what the slot adds to it


class TrainedMatrix(NamedTuple):
    """A frozen linear layer, and where its LoRA's A and B are among the operation's tensors."""

    weight: Tensor
    bias: Tensor | None
    place: int | None = None
    scale: float = 1.0  # LoRA's scaling and dropout's 1 / (1 - p)
    dropped: DropoutArguments = NO_DROPOUT

    @property
    def adapted(self) -> bool:
        return self.place is not None


class Draws:
    """What the parts of a layer are told in one pass, asked for in the order in which its modules draw at random.

    tensors: A (R, D_in) and B (D_out, R) of every adapted matrix that was asked for.
    """

    def __init__(self, context: BatchContext) -> None:
        self._masks = context.masks or Masks()
        self.tensors: list[Tensor] = []

    def dropped(self, p: float) -> DropoutArguments:
        return self._masks.dropped(p) if p > 0.0 else NO_DROPOUT

    def matrix(self, layer: nn.Linear, factors: LoRAFactors | None) -> TrainedMatrix:
        if factors is None:
            return TrainedMatrix(layer.weight, layer.bias)
        dropped = self.dropped(factors.dropout if factors.training else 0.0)
        self.tensors += [factors.lora_A, factors.lora_B]
        return TrainedMatrix(layer.weight, layer.bias, len(self.tensors) - 2, factors.scaling * dropped.scale, dropped)


class Matrices:
    """All matrices of one pass: y = W x + b + scale (drop(x) A^T) B^T, and back. Holds no tensor of the pass."""

    def __init__(self, library: Library, context: BatchContext, each: Sequence[TrainedMatrix]) -> None:
        self.each, self._library, self._route = each, library, context
        self._by = [int8.FrozenProducts()] * len(each)

    @property
    def factors(self) -> int:
        """How many tensors the adapted ones have."""
        return 2 * sum(one.adapted for one in self.each)

    def forward(self, i: int, x: Tensor, tensors: Sequence[Tensor], inner: list[Tensor]) -> Tensor:
        """(N, D_in) -> (N, D_out). inner: has drop(x) A^T of every adapted matrix, of which this one's is added."""
        weight, bias, place, scale, dropped = self.each[i]
        self._by[i] = int8.products(self._route, x, weight, bias)
        y = self._by[i].forward(x, weight, bias)
        if place is not None:
            inner.append(self._library.lora(x, tensors[place], tensors[place + 1], scale, dropped, y))
        return y

    def frozen(self, i: int, x: Tensor) -> Tensor:
        """W x + b once more."""
        weight, bias, *_ = self.each[i]
        return self._by[i].forward(x, weight, bias)

    def cheap(self, i: int) -> bool:
        """Whether `frozen` costs little."""
        return self._by[i].cheap

    def backward(self, i: int, dy: Tensor, given: Callable[[], Any], back: Back, wanted: bool = True) -> Any:
        """The gradient of what the matrix was given, if it is wanted. given: that, asked for where LoRA needs it."""
        weight, _, place, scale, dropped = self.each[i]
        dx = self._by[i].backward(dy, weight) if wanted else None
        if place is not None:
            told = given(), *back.tensors[place : place + 2], scale, dropped, back.inner[place // 2], dy, dx
            back.found[place : place + 2] = self._library.lora_backward(*told)
        return dx

    def backward_both(self, i: int, j: int, dy: tuple[Tensor, Tensor]) -> Tensor:
        """Of two frozen matrices that were given the same."""
        return self._by[i].backward_both(dy, (self.each[i].weight, self.each[j].weight))


class Back(NamedTuple):
    """On the way back: the operation's tensors, drop(x) A^T of the adapted matrices, and the gradients found so far."""

    tensors: Sequence[Tensor]
    inner: Sequence[Tensor]
    found: list[Tensor | None]  # of each tensor


def stands_aside(context: BatchContext) -> bool:
    """Whether this pass is none of one adapter that trains on unpadded rows."""
    aside = context.serves or context.cache is not None or context.capture is not None
    aside = aside or not enabled("trained_layer")
    return aside or context.lengths is None or context.single() is None or torch.is_autocast_enabled("cpu")


def linears_of(modules: Iterable[nn.Module], slot: int) -> Linears | None:
    """Linear layers with what this slot adds to them, or None where one is anything else."""
    found: Linears = []
    for each in modules:
        base, factors = each, None
        if type(each) is RoutedLinear:
            if watched(each):
                return None
            base, factors = each.base_layer, each.factors(slot)
        if type(base) is not nn.Linear or not base.weight.is_contiguous() or watched(base):
            return None
        if not isinstance(vars(base).get("forward"), int8.Forward | None):
            return None
        if factors is not None and not factors.by_kernels(base.weight):
            return None
        found.append((base, factors))
    return found


def watched(module: nn.Module) -> bool:
    """Whether somebody else is called when the module is."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
