"""One adapter as passes read it: all of its tensors in one flat buffer, and the place of each tensor in it.

Adapters of one shape share these places, so with hundreds in memory each one adds little more than its numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from turret.adapters.scaled import LayerChange
from turret.tasks import Task

Pair = tuple[Tensor, Tensor]  # the factors of a linear layer, A (R, D_in) and the scaled B (R, D_out); or keys, values


@dataclass(frozen=True)
class TensorLayout:
    """Named tensors one after another in a flat buffer."""

    shapes: tuple[tuple[str, torch.Size], ...]

    @functools.cached_property
    def count(self) -> int:
        """Elements of all tensors."""
        return sum(shape.numel() for _, shape in self.shapes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors in a flat buffer of `count` elements."""
        parts = torch.split(flat, [shape.numel() for _, shape in self.shapes])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes, strict=True)}


@dataclass(frozen=True, slots=True)
class FactorPlace:
    """The first element of a layer's factors: A (R, D_in), followed by B (R, D_out)."""

    layer: int
    start: int
    d_in: int
    d_out: int


@dataclass(frozen=True)
class FactorLayout:
    """The factors of a LoRA, one layer after another."""

    rank: int
    places: tuple[FactorPlace, ...]
    offsets: Tensor  # (L, 2) int64: bytes from the start of the buffer to A and to B of each layer, -1 for none

    def pairs(self, flat: Tensor) -> dict[int, Pair]:
        """A (R, D_in) and the scaled B (R, D_out) by layer: views of the buffer."""
        R, pairs = self.rank, {}
        for place in self.places:
            middle = place.start + R * place.d_in
            A = flat[place.start : middle].view(R, place.d_in)
            pairs[place.layer] = A, flat[middle : middle + R * place.d_out].view(R, place.d_out)
        return pairs


@dataclass(eq=False, slots=True)
class AdapterTensors:
    """The tensors of one adapter, in the base's precision: factors, then prefix, then head."""

    digest: str
    task: Task
    flat: Tensor
    layout: FactorLayout | None  # None without a LoRA
    prefix: Mapping[str, Tensor]  # by group: (L, 2, H, P, D), views of `flat`
    head_layout: TensorLayout  # of the end of `flat`, by names in the model
    scaled: Mapping[int, LayerChange] = field(default_factory=dict)  # by layer, of a method that does more than LoRA
    whole: Mapping[str, nn.Module] = field(default_factory=dict)  # by path, in place of the base's own

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.flat, *self.beside))

    @property
    def beside(self) -> list[Tensor]:
        """The tensors that are not in the buffer, each once."""
        scaled = [tensor for layer in self.scaled.values() for tensor in layer.tensors]
        every = [*scaled, *(each for module in self.whole.values() for each in module.parameters())]
        return list({id(tensor): tensor for tensor in every}.values())

    @property
    def rank(self) -> int:
        """The rank of its LoRA; 0 without one."""
        return 0 if self.layout is None else self.layout.rank

    @property
    def prefix_length(self) -> int:
        """P; 0 without a prefix."""
        return next((each.shape[3] for each in self.prefix.values()), 0)

    @property
    def head(self) -> dict[str, Tensor]:
        return self.head_layout.views(self.flat[self.flat.numel() - self.head_layout.count :])

    @property
    def address(self) -> int:
        return self.flat.data_ptr()

    @property
    def offsets(self) -> Tensor:
        """(L, 2) int64: bytes from `address` to A and to B of each layer, -1 for none."""
        assert self.layout is not None
        return self.layout.offsets

    def pairs(self) -> dict[int, Pair]:
        """A (R, D_in) and the scaled B (R, D_out) by layer."""
        return {} if self.layout is None else self.layout.pairs(self.flat)


def tensor_layout(tensors: Mapping[str, Tensor]) -> TensorLayout:
    """The layout of these tensors, sorted by name: the order in a file may be any."""
    return _shared_layout(tuple((name, each.shape) for name, each in sorted(tensors.items())))


_shared_layout = functools.lru_cache(256)(TensorLayout)


@functools.lru_cache(256)
def factor_layout(rank: int, layers: tuple[tuple[int, int, int], ...], total: int, dtype: torch.dtype) -> FactorLayout:
    """The layout of a LoRA's factors.

    Args:
        rank: R of every layer.
        layers: (number, D_in, D_out) of each adapted layer, in the order of the buffer.
        total: Linear layers of the base.
        dtype: Of the buffer.
    """
    offsets = torch.full((total, 2), -1)
    ends = accumulate(rank * (d_in + d_out) for _, d_in, d_out in layers)
    places = tuple(
        FactorPlace(number, start, *sizes) for start, (number, *sizes) in zip((0, *ends), layers, strict=False)
    )
    for place in places:
        offsets[place.layer] = torch.tensor([place.start, place.start + rank * place.d_in]) * dtype.itemsize
    return FactorLayout(rank, places, offsets)
