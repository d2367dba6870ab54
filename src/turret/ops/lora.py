"""Frozen linear layers and the LoRA on them: its formula, one adapter that trains, and a mixture in one pass.

    y = W x + b + scale (drop(x) A^T) B^T        (Hu et al. 2021)
    y_t += (x_t A^T) B                           for every token t, with the factors of its own adapter

In a mixture B contains the scaling. Source: Punica (Chen et al. 2023, arXiv 2310.18547), which calls it segmented
gather matrix-vector multiplication (SGMV).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turret.ops.core import (
    REFERENCE,
    FunctionContext,
    Gradients,
    LoraGradients,
    Ops,
    apply_function,
    is_enabled,
    to_device,
)
from turret.ops.cpu.compiled import CpuOps
from turret.ops.dropout import Masks
from turret.ops.gpu.ops import GpuOps
from turret.ops.structs import AdapterSpans, BaseProducts, Group, Lora, Matrix
from turret.ops.table import ops_for


def lora_delta(x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`scaling * B A x`: what LoRA adds to `W x`, after dropout of x; the reference of every faster path.

    Args:
        x: (..., D_in).
        A: (R, D_in).
        B: (D_out, R).
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.

    Returns:
        (..., D_out).

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    return low_rank(x, A, B.mT, scaling)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """`scaling * (x A^T) B`. x: (..., D_in), A: (R, D_in), B: (R, D_out) -> (..., D_out)."""
    h = x @ A.mT  # (..., R)
    return (h if scaling == 1.0 else h * scaling) @ B  # the smallest tensor is scaled


# --- a group of layers ------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    """y (N, D_out) of each layer of a group, and what LoRA's backward pass needs."""

    y: list[Tensor]
    inner: list[Tensor]


def forward(ops: Ops, group: Group, x: Tensor, plus: Tensor | None = None) -> Forward:
    """W x + b + LoRA's part + plus, of each layer. x: (N, D_in)."""
    y = [each.base.forward(x, each.weight, each.bias) for each in group]
    return Forward(y, ops.add_lora(y, x, [each.lora for each in group], plus))


def backward(
    ops: Ops, group: Group, x: Callable[[], Tensor], inner: Sequence[Tensor], dy: Sequence[Tensor], wanted: bool = True
) -> tuple[Tensor | None, LoraGradients]:
    """(dx (N, D_in), dA and dB of every LoRA).

    Args:
        ops: those of the forward pass.
        group: likewise.
        x: gives the input; called only if a layer has a LoRA.
        inner: from the forward pass.
        dy: (N, D_out) of each layer.
        wanted: whether dx is needed.
    """
    dx: Tensor | None = None
    for each, own in zip(group, dy, strict=True) if wanted else ():
        dx = each.base.backward(own, each.weight, dx)
    return dx, ops.lora_backward([each.lora for each in group], x, inner, dy, dx)


def lora_factors(groups: Iterable[Group]) -> list[Tensor]:
    """A and B of every LoRA, in the order of `backward`."""
    return [each for group in groups for m in group if m.lora is not None for each in (m.lora.A, m.lora.B)]


def with_mask(lora: Lora, masks: Masks, keys: Callable[[], Tensor]) -> Lora:
    """The LoRA with the next mask of a pass. keys: of the tokens of its input."""
    return lora._replace(dropped=masks.arguments(lora.p, keys))


# --- one layer --------------------------------------------------------------------------------------------------------


class _Adapted(torch.autograd.Function):
    """One layer and its LoRA. x: (..., D_in) -> (..., D_out). A and B are arguments for autograd to see."""

    @staticmethod
    def forward(ctx: FunctionContext, ops: Ops, matrix: Matrix, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        (y,), inner = forward(ops, (matrix,), x.reshape(-1, x.shape[-1]))
        ctx.ops, ctx.group = ops, (matrix,)
        ctx.save_for_backward(x, *inner)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        x, *inner = ctx.saved_tensors
        dy = gradients[0].reshape(-1, gradients[0].shape[-1]).contiguous()
        rows = x.reshape(-1, x.shape[-1])
        dx, own = backward(ctx.ops, ctx.group, lambda: rows, inner, [dy], ctx.needs_input_grad[2])
        return None, None, None if dx is None else dx.view(x.shape), *own


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base: BaseProducts,
    lora: Lora,
    masks: Masks,
    stream: str | None,
) -> Tensor | None:
    """A frozen layer and its LoRA, with little saved for the backward pass; None if torch must compute them.

    Args:
        x: (..., D_in).
        weight: of the layer, in any form that `base` takes.
        bias: (D_out,) or None.
        base: the products of the weight.
        lora: without a mask.
        masks: of the pass.
        stream: whose tokens x has.
    """
    ops = ops_for(x)
    if not (ops.kernels and x.is_contiguous() and is_enabled("lora_kernel") and ops.takes_lora([lora])):
        if not is_enabled("lora_gradient"):
            return None
        ops = REFERENCE
    own = with_mask(lora, masks, lambda: masks.keys_of(x, stream))
    return apply_function(_Adapted, ops, Matrix(weight, bias, base, own), x, lora.A, lora.B)


# --- frozen layers ---------------------------------------------------------------------------------------------------
# On few tokens (a decoding step, a short text) a general library packs W again at every call, which pays only for
# hundreds of tokens. The kernel reads W once, in place. A token's output does not depend on the other tokens of the
# pass, bit for bit.


def linear(layer: nn.Module, x: Tensor, *, helped: bool = True) -> Tensor:
    """layer(x), by the kernel if the tokens are few and no gradient is needed. x: (..., D_in) -> (..., D_out).

    helped: whether helper threads may be awake; if not, a small product is not worth waking them.
    """
    if takes_few(layer, x):
        return ops_for(x).linear_few(x, layer.get_parameter("weight"), layer._parameters["bias"], helped)
    return layer(x)


def takes_few(layer: nn.Module, x: Tensor) -> bool:
    """Whether the kernel for few tokens computes layer(x)."""
    if torch.is_grad_enabled() or not is_plain_linear(layer) or not is_enabled("frozen_linear"):
        return False
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    ops = ops_for(x, weight) if bias is None else ops_for(x, weight, bias)
    return 0 < x.numel() <= ops.few * x.shape[-1] and weight.is_contiguous() and x.is_contiguous()


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling the layer is a product and nothing else: no subclass, no hooks, no replaced forward."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not hooked


class FrozenProducts(NamedTuple):
    """In the base's own precision: `structs.BaseProducts`."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    def backward(self, dy: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
        return dy @ weight if plus is None else plus.addmm_(dy, weight)


# --- a mixture of adapters --------------------------------------------------------------------------------------------


Pair = tuple[Tensor, Tensor]  # the factors of a linear layer, A (R, D_in) and the scaled B (R, D_out); or keys, values
Segment = tuple[int, int, Mapping[int, Pair]]  # first token, one past the last, and factors by number of the layer


class LoadedFactors(Protocol):
    """The factors of one adapter, in one flat tensor.

    offsets: (L, 2) int64, bytes from the start to A and to the scaled B of each layer, -1 for none.
    """

    @property
    def flat(self) -> Tensor: ...
    @property
    def rank(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def offsets(self) -> Tensor: ...
    def pairs(self) -> Mapping[int, Pair]:
        """A and B of each layer that has them, by its number."""
        ...


Span = tuple[int, int, LoadedFactors]  # first token, one past the last, and their adapter


def sgmv(y: Tensor, x: Tensor, segments: Iterable[Segment], layer: int) -> None:
    """Add (x A^T) B to y for each segment of tokens with one adapter. Other tokens stay as they are.

    Args:
        y: (N, D_out), changed in place.
        x: (N, D_in).
        segments: tokens and their adapter's factors.
        layer: number of the linear layer.
    """
    for start, end, own in segments:
        if layer in own:
            A, B = own[layer]
            y[start:end].addmm_(x[start:end] @ A.mT, B)  # rounded once


class MixedRows:
    """The LoRA of every token of a pass, in torch.

    spans: the same for the kernels, where they compute.
    """

    spans: AdapterSpans | None = None

    def __init__(self, spans: Sequence[Span]) -> None:
        self._segments = [(start, end, adapter.pairs()) for start, end, adapter in spans]

    def products(
        self,
        layers: Sequence[nn.Module],
        numbers: Sequence[int],
        x: Tensor,
        plus: Tensor | None = None,
        *,
        helped: bool = True,
    ) -> list[Tensor]:
        """W x + b + each token's LoRA + plus, of frozen layers with one input. x: (N, D_in) -> (N, D_out) each.

        Args:
            layers: of the base.
            numbers: of the layers among all that are adapted.
            x: the tokens.
            plus: (N, D_out), added to every result.
            helped: as in `linear`.
        """
        y = [self._linear(layer, number, x, helped) for layer, number in zip(layers, numbers, strict=True)]
        return y if plus is None else [each.add_(plus) for each in y]

    def _linear(self, layer: nn.Module, number: int, x: Tensor, helped: bool) -> Tensor:
        """One layer, with each token's LoRA."""
        y = linear(layer, x, helped=helped)
        sgmv(y, x, self._segments, number)
        return y


class CpuRows(MixedRows):
    """By the kernels: the spans of tokens and the addresses of their factors, computed once for all layers."""

    def __init__(self, ops: CpuOps, spans: Sequence[Span], tokens: int) -> None:
        self._ops, self._adapters = ops, [adapter for _, _, adapter in spans]  # C reads their memory
        self.spans = kernel_spans(spans, tokens)

    def _linear(self, layer: nn.Module, number: int, x: Tensor, helped: bool) -> Tensor:
        if takes_few(layer, x):
            weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
            return self._ops.linear_few(x, weight, bias, helped, self.spans, number)
        y: Tensor = layer(x)
        if self.spans is not None:
            y = y.contiguous()
            self._ops.low_rank(self.spans, number, x.contiguous(), y)
        return y


class Stack:
    """The factors of decode rows with adapters of one shape, for batched products: one copy for a mixture.

    What it buys over PEFT's `adapter_names`: two products for all rows of a layer, not two for each adapter.

    Args:
        adapters: of these rows, all of one layout.
        rows: (B,) int64, the places of these rows among all decode rows; None: they are all.
    """

    def __init__(self, adapters: Sequence[LoadedFactors], rows: Sequence[int] | None) -> None:
        number = {adapter: place for place, adapter in enumerate(dict.fromkeys(adapters))}
        first, mixed, device = adapters[0], len(number) > 1, adapters[0].flat.device
        self._pairs = first.pairs()
        self._starts = (first.offsets // first.flat.element_size()).tolist()
        count = sum(part.numel() for pair in self._pairs.values() for part in pair)  # the factors come first
        self._flat = torch.stack([each.flat[:count] for each in number]) if mixed else None
        shared = mixed and len(number) < len(adapters)
        self._of_row = to_device(torch.tensor([number[each] for each in adapters]), device) if shared else None
        self._rows = None if rows is None else to_device(torch.tensor(rows), device)

    def add(self, y: Tensor, x: Tensor, layer: int) -> None:
        """y_t += (x_t A^T) B of each row's adapter. y: (N, D_out), in place; x: (N, D_in), of all decode rows."""
        if layer not in self._pairs:
            return
        own = x if self._rows is None else x.index_select(0, self._rows)
        if self._flat is None:
            A, B = self._pairs[layer]
            self._put(y, own @ A.mT, B)
        else:
            A, B = (
                self._stack_factor(self._flat, *each)
                for each in zip(self._starts[layer], self._pairs[layer], strict=True)
            )
            self._put(y, torch.bmm(own[:, None], A.mT), B)  # (B, 1, R)

    def _stack_factor(self, flat: Tensor, first: int, like: Tensor) -> Tensor:
        """A factor of each row's adapter, (B, R, D). first: its place in `flat`."""
        every = flat[:, first : first + like.numel()].view(-1, *like.shape)
        return every if self._of_row is None else every.index_select(0, self._of_row)

    def _put(self, y: Tensor, h: Tensor, B: Tensor) -> None:
        if self._rows is not None:
            y.index_add_(0, self._rows, (h @ B).view(len(self._rows), -1))
        elif h.ndim == 2:
            y.addmm_(h, B)
        else:
            y[:, None].baddbmm_(h, B)


class GpuRows(MixedRows):
    """On a GPU: `sgmv` for the tokens of prefill rows, batched products for those of decode rows, which come after.

    stacks: the factors of the decode rows.
    """

    def __init__(self, spans: Sequence[Span], prefill_tokens: int, stacks: Sequence[Stack]) -> None:
        super().__init__(spans)
        self._prefill_tokens, self.stacks = prefill_tokens, stacks

    def _linear(self, layer: nn.Module, number: int, x: Tensor, helped: bool) -> Tensor:
        y = super()._linear(layer, number, x, helped)
        for stack in self.stacks:
            stack.add(y[self._prefill_tokens :], x[self._prefill_tokens :], number)
        return y


def stacks_of(steps: Sequence[LoadedFactors | None]) -> list[Stack]:
    """The factors of decode rows, those of one layout together."""
    groups: dict[int, list[int]] = {}
    for row, own in enumerate(steps):
        if own is not None:
            groups.setdefault(id(own.offsets), []).append(row)
    found = []
    for rows in groups.values():
        adapters = [own for row in rows if (own := steps[row]) is not None]
        found.append(Stack(adapters, None if len(rows) == len(steps) else rows))
    return found


def mixed_rows(
    weights: Sequence[Tensor],
    spans: Sequence[Span],
    tokens: int,
    steps: Sequence[LoadedFactors | None] = (),
    latest: Sequence[Stack] | None = None,
) -> MixedRows:
    """The LoRA of every token of a pass, as the device reads it.

    Args:
        weights: of the frozen layers.
        spans: the tokens of prefill rows and their adapters.
        tokens: of prefill rows.
        steps: the adapter of each decode row; their tokens come after those.
        latest: what a GPU made of the same `steps` in an earlier pass.
    """
    ops = ops_for(*weights)
    if isinstance(ops, GpuOps):
        return GpuRows(spans, tokens, stacks_of(steps) if latest is None else latest)
    following = ((tokens + row, tokens + row + 1, own) for row, own in enumerate(steps) if own is not None)
    every = [*spans, *following]
    return CpuRows(ops, every, tokens + len(steps)) if isinstance(ops, CpuOps) else MixedRows(every)


def kernel_spans(spans: Sequence[Span], tokens: int) -> AdapterSpans | None:
    """The spans of a pass of that many tokens for the kernels; None if there are none.

    The result holds addresses: keep the adapters as long as it is used.
    """
    if not spans:
        return None
    starts, ends, adapters = zip(*spans, strict=True)
    offsets = torch.stack([adapter.offsets for adapter in adapters])  # (S, L, 2)
    addresses = offsets + torch.tensor([adapter.address for adapter in adapters])[:, None, None]
    return AdapterSpans(
        torch.tensor(starts),
        torch.tensor(ends),
        torch.tensor([adapter.rank for adapter in adapters]),
        addresses.masked_fill_(offsets < 0, 0),
        tokens,
    )
