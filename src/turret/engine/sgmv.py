"""LoRA of rows with different adapters, in torch: the reference for the kernel `low_rank`, used where it is missing.

    y_t += (x_t A^T) B    for every token t, with the factors A (R, D_in) and B (R, D_out) of its adapter

B contains the scaling. Source: Punica (Chen et al. 2023, arXiv 2310.18547), which calls it segmented gather
matrix-vector multiplication (SGMV), and batched (BGMV) where every row has one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from turret.card_kernels import MixedLoRA
from turret.engine.adapter_tensors import AdapterTensors, Pair

Segment = tuple[int, int, Mapping[int, Pair]]  # first token, one past the last, and factors by layer


def sgmv(y: Tensor, x: Tensor, segments: Iterable[Segment], layer: int) -> None:
    """Add (x A^T) B to y for each segment of tokens with one adapter. Other tokens stay as they are.

    Args:
        y: (N, D_out), changed in place.
        x: (N, D_in).
        segments: Tokens and their adapter's factors.
        layer: Number of the linear layer.
    """
    for start, end, factors in segments:
        if layer in factors:
            A, B = factors[layer]
            y[start:end].addmm_(x[start:end] @ A.mT, B)


def mixed_rows(rows: Sequence[AdapterTensors | None]) -> MixedLoRA | None:
    """The adapter of each row as a card reads it, or None if no row has factors. No factor is copied."""
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


class BGMV:
    """`sgmv` for rows of one token each: two batched products a layer, whatever the number of adapters.

    The factors of S adapters are copied side by side, A (S, R, D_in) and B (S, R, D_out), smaller ranks filled with
    zeros. The copies are kept as long as the same adapters decode.
    """

    def __init__(self) -> None:
        self._adapters: list[AdapterTensors] = []
        self._factors: dict[int, Pair] = {}  # by layer
        self._rows = self._place = self._turn = torch.empty(0, dtype=torch.int64)
        self._turns = 0

    def arrange(self, rows: Sequence[AdapterTensors | None]) -> None:
        """Set the adapter of each row for the next calls of `add`; None for a row without factors."""
        adapters = list(dict.fromkeys(each for each in rows if each is not None))
        if not set(adapters) <= set(self._adapters) or 2 * len(adapters) < len(self._adapters):
            self._adapters, self._factors = adapters, _side_by_side(adapters)
        counts = [0] * len(self._adapters)  # rows of each adapter so far
        index = []
        for row, adapter in enumerate(rows):
            if adapter is not None:
                place = self._adapters.index(adapter)
                index.append((row, place, counts[place]))
                counts[place] += 1
        device = self._adapters[0].flat.device if self._adapters else None
        self._rows, self._place, self._turn = torch.tensor(index, device=device).reshape(-1, 3).long().unbind(1)
        self._turns = max(counts, default=0)

    def add(self, y: Tensor, x: Tensor, layer: int) -> None:
        """Add (x A^T) B to every row of y that has factors. y: (n, D_out), changed in place; x: (n, D_in)."""
        if not self._turns or layer not in self._factors:
            return
        A, B = self._factors[layer]
        grouped = x.new_zeros(len(A), self._turns, x.shape[1])  # (S, rows of one adapter, D_in)
        grouped[self._place, self._turn] = x[self._rows]
        delta = torch.bmm(torch.bmm(grouped, A.mT), B)
        y.index_add_(0, self._rows, delta[self._place, self._turn])

    def clear(self) -> None:
        """Free the copies."""
        self._adapters, self._factors, self._turns = [], {}, 0


def _side_by_side(adapters: Sequence[AdapterTensors]) -> dict[int, Pair]:
    """By layer, A (S, R, D_in) and B (S, R, D_out)."""
    factors = [adapter.pairs() for adapter in adapters]
    rank = max((adapter.rank for adapter in adapters), default=0)
    stacked: dict[int, Pair] = {}
    for layer in sorted({layer for own in factors for layer in own}):
        first, second = next(own[layer] for own in factors if layer in own)
        A, B = (each.new_zeros(len(adapters), rank, each.shape[1]) for each in (first, second))
        for place, own in enumerate(factors):
            if layer in own:
                A[place, : len(own[layer][0])], B[place, : len(own[layer][1])] = own[layer]
        stacked[layer] = A, B
    return stacked
