"""The factors of the adapters that decode now, side by side, so that one product a layer serves rows of any mixture.

A: (S, L, R, D_in) for L layers that read the same x, B: (S, R, D_out) a layer; S places, every adapter filled up with
zeros to the largest rank R. There are two ways to multiply, with the same result:

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

    @property
    def rank(self) -> int: ...

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
    hidden: Tensor | None  # (n, places, 1) the places that are not the row's own
    alone: bool = False  # all rows take place `low`


class StackedFactors:
    """Places for adapters, kept while they decode; new ones are added at the end."""

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        siblings: Mapping[int, tuple[int, ...]],
        like: Tensor,
        *,
        batched: bool | None = None,
    ) -> None:
        self._sizes, self._siblings, self._like = sizes, siblings, like
        self.batched = (like.dtype == torch.float32 or like.device.type != "cpu") if batched is None else batched
        self._places: list[Factors] = []
        self._room = self._rank = 0
        self._A: dict[int, Tensor] = {}  # by the first of the layers that share it
        self._B: dict[int, Tensor] = {}
        self._key: tuple[int, ...] = ()  # the adapters of the rows as they are arranged; all are in places, so alive
        self._groups: list[_Group] = []
        self._x: Tensor | None = None
        self._first = -1
        self._h: list[Tensor] = []  # a group each, of the layers that read this x

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
        self.forget()

    def forget(self) -> None:
        """Let go of the pass that is over."""
        self._x, self._first, self._h = None, -1, []

    def add(self, layer: int, y: Tensor, x: Tensor, start: int) -> None:
        """y += each row's own product, for the rows from `start` on. x: (N, D_in), y: (N, D_out)."""
        siblings = self._siblings[layer]
        if siblings[0] not in self._A or layer not in self._B:
            return
        if self._x is not x or self._first != siblings[0]:
            own = x[start : start + len(self._key)]
            self._x, self._first = x, siblings[0]
            self._h = [self._inner(group, own, self._A[siblings[0]]) for group in self._groups]
        out, number, B = y[start : start + len(self._key)], siblings.index(layer), self._B[layer]
        for group, h in zip(self._groups, self._h, strict=True):
            mine = h[..., number * self._rank : (number + 1) * self._rank]  # one layer's ranks
            if group.alone:
                delta = mine @ B[group.low]
            elif group.hidden is None:
                delta = _row_by_row(torch.bmm(mine, B[group.low : group.high]), group)
            else:
                flat, wide = mine.flatten(1), B[group.low : group.high].flatten(0, 1)
                if group.rows is None:
                    out.addmm_(flat, wide)
                    continue
                delta = flat @ wide
            if group.rows is None:
                out += delta
            else:
                out.index_add_(0, group.rows, delta)

    def _inner(self, group: _Group, x: Tensor, A: Tensor) -> Tensor:
        """h of a group's rows: (n, L R) alone, (places, depth, L R) batched, (n, places, L R) stacked."""
        own = x if group.rows is None else x[group.rows]
        places = A[group.low : group.high].flatten(1, 2)  # (places, L * R, D_in)
        if group.alone:
            return own @ places[0].mT
        if group.hidden is None:
            return torch.bmm(_beside(own, group), places.mT)
        h = (own @ places.flatten(0, 1).mT).view(len(own), group.high - group.low, -1)
        return h.masked_fill_(group.hidden, 0.0)

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
                d_in, d_out = self._sizes[layer]
                siblings = self._siblings[layer]
                if siblings[0] not in self._A:
                    self._A[siblings[0]] = self._like.new_zeros(self._room, len(siblings), self._rank, d_in)
                if layer not in self._B:
                    self._B[layer] = self._like.new_zeros(self._room, self._rank, d_out)
                self._A[siblings[0]][at, siblings.index(layer), : each.rank] = A_t.mT
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
        owner = torch.arange(high - low, device=device)
        return _Group(index, low, high, at, None, 1, (owner != at[:, None])[:, :, None])

    def _index(self, rows: Sequence[int], count: int) -> Tensor | None:
        if list(rows) == list(range(count)):
            return None
        return torch.tensor(rows, device=self._like.device)


def _beside(x: Tensor, group: _Group) -> Tensor:
    """Every row beside its adapter's place: (n, D_in) -> (places, depth, D_in)."""
    if group.at is None:
        return x[:, None]
    beside = x.new_zeros(group.high - group.low, group.depth, x.shape[1])
    beside[group.at, 0 if group.deep is None else group.deep] = x
    return beside


def _row_by_row(y: Tensor, group: _Group) -> Tensor:
    """And back: (places, depth, D_out) -> (n, D_out)."""
    if group.at is None:
        return y[:, 0]
    return y[group.at, 0 if group.deep is None else group.deep]
