"""The LoRA of rows with different adapters in one pass: every token takes that of its row.

    y_t += (x_t A^T) B    for every token t, with the factors A (R, D_in) and B (R, D_out) of its adapter

B contains the scaling. Source: Punica (Chen et al. 2023, arXiv 2310.18547), which calls it segmented gather
matrix-vector multiplication (SGMV).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from turret.ops.copies import copied
from turret.ops.cpu.ops import CpuOps
from turret.ops.frozen import linear, takes_few
from turret.ops.gpu.ops import GpuOps
from turret.ops.structs import AdapterSpans
from turret.ops.table import of

Pair = tuple[Tensor, Tensor]
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
            helped: as in `frozen.linear`.
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
        self._library, self._adapters = ops.library, [adapter for _, _, adapter in spans]  # C reads their memory
        self.spans = kernel_spans(spans, tokens)

    def _linear(self, layer: nn.Module, number: int, x: Tensor, helped: bool) -> Tensor:
        if takes_few(layer, x):
            weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
            return self._library.linear(x, weight, bias, self.spans, number, helped=helped)
        y: Tensor = layer(x)
        if self.spans is not None:
            y = y.contiguous()
            self._library.low_rank(self.spans, number, x.contiguous(), y)
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
        self._of_row = copied(torch.tensor([number[each] for each in adapters]), device) if shared else None
        self._rows = None if rows is None else copied(torch.tensor(rows), device)

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
                self._stacked(self._flat, *each) for each in zip(self._starts[layer], self._pairs[layer], strict=True)
            )
            self._put(y, torch.bmm(own[:, None], A.mT), B)  # (B, 1, R)

    def _stacked(self, flat: Tensor, first: int, like: Tensor) -> Tensor:
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
    ops = of(*weights)
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
