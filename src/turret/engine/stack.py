"""The factors of the adapters that decode now, side by side, so that one product a layer serves rows of any mixture.

A: (S, R, D_in) and B: (S, R, D_out) a layer, S places, every adapter filled up with zeros to the largest rank R. There
are two ways to multiply, with the same result:

- batched: a row is put beside its adapter's place, then h_s = x_s A_s^T, y_s += h_s B_s. Where the library is quick
  with many small products: float32 on a processor, everything on a GPU.
- stacked: h = x A^T over all places of a few rows, what is another adapter's is set to zero, y += h B. More arithmetic,
  fewer calls: bfloat16 on a processor.

An adapter with many rows is multiplied by itself. Everything here is a copy of what a bank holds, for as long as it
decodes. Refuses to know requests and loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TOGETHER = 4  # rows of one adapter beyond which it is multiplied by itself
CHUNK = 16  # rows of one stacked product


class Factors(Protocol):
    """One adapter's factors, as the bank has them."""

    rank: int

    def pairs(self) -> Mapping[int, tuple[Tensor, Tensor]]:
        """A^T (D_in, R) and the scaled B (R, D_out) of every layer it adapts."""
        ...


@dataclass(frozen=True)
class _Group:
    """Rows that are multiplied together. rows: (n,) or None for all of them, in order."""

    rows: Tensor | None
    low: int  # the first of the places they take, and one behind the last
    high: int
    at: Tensor | None  # (n,) where each row's adapter is among those places; None where row i has place i
    deep: Tensor | None  # (n,) its number among the rows of its adapter; None where each has one row
    depth: int
    hidden: Tensor | None  # (n, places * R) what is not the row's own
    alone: bool = False  # all rows take place `low`


class Stack:
    """Places for adapters, kept while they decode; new ones are added at the end."""

    def __init__(self, sizes: Sequence[tuple[int, int]], like: Tensor, *, batched: bool | None = None) -> None:
        self._sizes, self._like = sizes, like
        self._places: list[Factors] = []
        self._room = self._rank = 0
        self._A: dict[int, Tensor] = {}
        self._B: dict[int, Tensor] = {}
        self._key: tuple[int, ...] = ()  # the adapters of the rows as they are arranged; all are in places, so alive
        self._groups: list[_Group] = []
        self.batched = (like.dtype == torch.float32 or like.device.type != "cpu") if batched is None else batched

    def arrange(self, rows: Sequence[Factors | None]) -> None:
        """The adapter of each row of the steps to come; None for a row without factors."""
        key = tuple(map(id, rows))
        if key == self._key and self._places:
            return
        wanted: list[Factors] = list({id(each): each for each in rows if each is not None}.values())
        self._seat(wanted)
        self._groups = self._grouped([None if each is None else self._places.index(each) for each in rows])
        self._key = key

    def clear(self) -> None:
        """Let go of everything: nobody decodes."""
        self._places, self._A, self._B = [], {}, {}
        self._room = self._rank = 0
        self._key, self._groups = (), []

    def add(self, layer: int, y: Tensor, x: Tensor) -> None:
        """y += each row's own product. x: (n, D_in), y: (n, D_out)."""
        if layer not in self._A:
            return
        A, B = self._A[layer], self._B[layer]
        for group in self._groups:
            own = x if group.rows is None else x[group.rows]
            if group.alone:
                delta = (own @ A[group.low].mT) @ B[group.low]
            elif group.hidden is None:
                delta = _batched(own, A[group.low : group.high], B[group.low : group.high], group)
            else:
                h = own @ A[group.low : group.high].flatten(0, 1).mT  # (n, places * R)
                h.masked_fill_(group.hidden, 0.0)
                if group.rows is None:
                    y.addmm_(h, B[group.low : group.high].flatten(0, 1))
                    continue
                delta = h @ B[group.low : group.high].flatten(0, 1)
            if group.rows is None:
                y += delta
            else:
                y.index_add_(0, group.rows, delta)

    # --- places ------------------------------------------------------------------------------------------------------

    def _seat(self, wanted: Sequence[Factors]) -> None:
        """Give everyone a place; begin anew where there is no room, the rank grows, or most places are empty."""
        known = {id(each) for each in self._places}
        new = [each for each in wanted if id(each) not in known]
        rank = max((each.rank for each in wanted), default=0)
        after = len(self._places) + len(new)
        if rank > self._rank or after > self._room or len(wanted) * 2 < len(self._places):
            self._places, self._A, self._B = [], {}, {}
            self._room, self._rank, new = max(4, 2 * len(wanted)), rank, list(wanted)
        for each in new:
            self._places.append(each)
            at = len(self._places) - 1
            for layer, (A_t, B) in each.pairs().items():
                if layer not in self._A:
                    d_in, d_out = self._sizes[layer]
                    self._A[layer] = self._like.new_zeros(self._room, self._rank, d_in)
                    self._B[layer] = self._like.new_zeros(self._room, self._rank, d_out)
                self._A[layer][at, : each.rank] = A_t.mT
                self._B[layer][at, : each.rank] = B

    def _grouped(self, places: Sequence[int | None]) -> list[_Group]:
        by_place: dict[int, list[int]] = {}
        for row, place in enumerate(places):
            if place is not None:
                by_place.setdefault(place, []).append(row)
        groups, few = [], []
        for place in sorted(by_place):
            rows = by_place[place]
            if len(rows) > TOGETHER or len(by_place) == 1:
                groups.append(_Group(self._index(rows, len(places)), place, place + 1, None, None, 0, None, alone=True))
            else:
                few += [(row, place, number) for number, row in enumerate(rows)]
        size = len(few) if self.batched else CHUNK
        starts = range(0, len(few), max(1, size))
        return groups + [self._group(few[start : start + size], len(places)) for start in starts]

    def _group(self, few: list[tuple[int, int, int]], count: int) -> _Group:
        """Rows of few each: (row, place, number among those of its place), by place."""
        if len(few) == count:
            few = sorted(few)  # all rows: no need to pick them
        rows, places, numbers = zip(*few, strict=True)
        low, high = min(places), max(places) + 1
        index = self._index(rows, count)
        device = self._like.device
        at = torch.tensor([place - low for place in places], device=device)
        if self.batched:
            depth = max(numbers) + 1
            straight = depth == 1 and [place - low for place in places] == list(range(high - low))
            deep = None if depth == 1 else torch.tensor(numbers, device=device)
            return _Group(index, low, high, None if straight else at, deep, depth, None)
        owner = torch.arange(high - low, device=device).repeat_interleave(self._rank)  # (places * R,)
        return _Group(index, low, high, at, None, 1, owner != at[:, None])

    def _index(self, rows: Sequence[int], count: int) -> Tensor | None:
        if list(rows) == list(range(count)):
            return None
        return torch.tensor(rows, device=self._like.device)


def _batched(x: Tensor, A: Tensor, B: Tensor, group: _Group) -> Tensor:
    """x: (n, D_in), A: (S, R, D_in), B: (S, R, D_out) -> (n, D_out)."""
    if group.at is None:
        beside = x[:, None]  # (S, 1, D_in)
    else:
        deep = 0 if group.deep is None else group.deep
        beside = x.new_zeros(len(A), group.depth, x.shape[1])
        beside[group.at, deep] = x
    delta = torch.bmm(torch.bmm(beside, A.mT), B)  # (S, depth, D_out)
    if group.at is None:
        return delta[:, 0]
    return delta[group.at, 0 if group.deep is None else group.deep]
