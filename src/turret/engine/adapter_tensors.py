"""One adapter as passes read it: all of its numbers in one contiguous run, and where each tensor lies in there.

Where they lie is the same for adapters of one shape, which share it: with hundreds in memory nothing but numbers is
each one's own. Knows tensors. Refuses to know slots, and who made the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shapes:
    """Tensors one behind the other, by name."""

    shapes: tuple[tuple[str, torch.Size], ...]

    @functools.cached_property
    def count(self) -> int:
        return sum(shape.numel() for _, shape in self.shapes)

    def views(self, run: Tensor) -> dict[str, Tensor]:
        """Of a run of so many numbers."""
        places = torch.split(run, [shape.numel() for _, shape in self.shapes])
        return {name: place.view(shape) for place, (name, shape) in zip(places, self.shapes, strict=True)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's factors begin: A (R, D_in), behind it B (R, D_out)."""

    layer: int
    start: int
    d_in: int
    d_out: int


@dataclass(frozen=True)
class FactorLayout:
    """A LoRA's factors, layer behind layer."""

    rank: int
    places: tuple[Place, ...]
    offsets: Tensor  # (L, 2) int64: bytes from the run's begin to A and to B of every layer, -1 where it has none

    def pairs(self, run: Tensor) -> dict[int, Pair]:
        """A^T (D_in, R) and the scaled B (R, D_out) by layer: views of the run."""
        R, pairs = self.rank, {}
        for place in self.places:
            middle = place.start + R * place.d_in
            A = run[place.start : middle].view(R, place.d_in)
            pairs[place.layer] = A.mT, run[middle : middle + R * place.d_out].view(R, place.d_out)
        return pairs


@dataclass(eq=False, slots=True)
class AdapterTensors:
    """One adapter's numbers."""

    digest: str
    task: Any  # that encodes its texts and makes its answers
    run: Tensor
    layout: FactorLayout | None  # of a LoRA, at the run's begin
    prefix: Mapping[str, Tensor]  # by group: (L, 2, H, P, D), views of the run
    ends: Shapes  # the head, at the run's end, by names in the model

    @property
    def bytes(self) -> int:
        return self.run.numel() * self.run.element_size()

    @property
    def rank(self) -> int:
        return 0 if self.layout is None else self.layout.rank

    @property
    def length(self) -> int:
        """P of its prefix."""
        return next((each.shape[3] for each in self.prefix.values()), 0)

    @property
    def head(self) -> dict[str, Tensor]:
        return self.ends.views(self.run[self.run.numel() - self.ends.count :])

    @property
    def address(self) -> int:
        return self.run.data_ptr()

    @property
    def offsets(self) -> Tensor:
        """Of a LoRA (`spans.Numbers`)."""
        assert self.layout is not None
        return self.layout.offsets

    def pairs(self) -> dict[int, Pair]:
        return {} if self.layout is None else self.layout.pairs(self.run)


def shapes_of(parts: Mapping[str, Tensor]) -> Shapes:
    """By names in their order: those of a file come in any."""
    return _shapes(tuple((name, each.shape) for name, each in sorted(parts.items())))


_shapes = functools.lru_cache(256)(Shapes)


@functools.lru_cache(256)
def layout_of(rank: int, layers: tuple[tuple[int, int, int], ...], total: int, dtype: torch.dtype) -> FactorLayout:
    """layers: (number, D_in, D_out) of those adapted, one behind the other, of `total` that the base has."""
    offsets = torch.full((total, 2), -1)
    ends = accumulate(rank * (d_in + d_out) for _, d_in, d_out in layers)
    places = tuple(Place(number, start, *sizes) for start, (number, *sizes) in zip((0, *ends), layers, strict=False))
    for place in places:
        offsets[place.layer] = torch.tensor([place.start, place.start + rank * place.d_in]) * dtype.itemsize
    return FactorLayout(rank, places, offsets)
