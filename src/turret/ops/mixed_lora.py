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

from turret.ops.cpu.ops import CpuOps
from turret.ops.frozen import linear, takes_few
from turret.ops.gpu.mixed import MixedLoRA as MixedLoRA
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


class GpuRows(MixedRows):
    """On a GPU: `sgmv` for the tokens of prefill rows, one launch for those of decode rows, which come after them.

    mixed: the LoRA of the decode rows, None without any. It may be replaced by one that reads other places of memory.
    """

    def __init__(self, spans: Sequence[Span], prefill_tokens: int, mixed: MixedLoRA | None) -> None:
        super().__init__(spans)
        self._prefill_tokens, self.mixed = prefill_tokens, mixed

    def products(
        self,
        layers: Sequence[nn.Module],
        numbers: Sequence[int],
        x: Tensor,
        plus: Tensor | None = None,
        *,
        helped: bool = True,
    ) -> list[Tensor]:
        if self.mixed is None:
            return super().products(layers, numbers, x, plus, helped=helped)
        start = self._prefill_tokens
        if start == 0:
            y = [linear(each, x) for each in layers]
            self.mixed.add(y, x, numbers, plus)
            return y
        y = super().products(layers, numbers, x, plus, helped=helped)
        self.mixed.add([each[start:] for each in y], x[start:], numbers)
        return y


def mixed_rows(
    weights: Sequence[Tensor],
    spans: Sequence[Span],
    tokens: int,
    steps: Sequence[LoadedFactors | None] = (),
    latest: MixedLoRA | None = None,
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
        return GpuRows(spans, tokens, latest or mixed_lora(steps))
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


def mixed_lora(rows: Sequence[LoadedFactors | None]) -> MixedLoRA | None:
    """The adapter of each row as a GPU reads it, or None if no row has factors. No factor is copied."""
    adapters = list(dict.fromkeys(each for each in rows if each is not None))
    if not adapters:
        return None
    place = {adapter: number for number, adapter in enumerate(adapters)}
    return MixedLoRA.of(
        [each.flat for each in adapters],
        [each.offsets for each in adapters],
        [each.rank for each in adapters],
        [-1 if each is None else place[each] for each in rows],
    )
