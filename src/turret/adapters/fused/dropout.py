"""Dropout that does not cost more than the layer it guards. Knows tensors; refuses to know what they mean.

    y = x * mask / (1 - p),    mask ~ Bernoulli(1 - p) an element, p rounded to 1/65536

On the CPU torch draws one double an element, which in attention takes longer than the two matrix products beside it.
Here 16 random bits decide an element. Where kernels are compiled no mask is kept at all: an element's bits are a hash
of its place and two seeds, computed again in the backward pass. Else a mask is a word of all ones or all zeros as wide
as the element, and applying it is one bitwise `and`; the masks of one pass are windows at random places into one run of
such words, so that a layer keeps none of its own: at any one element the masks of two layers are independent unless
they start at the same place, which is avoided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from turret.adapters.fused import enabled
from turret.kernels import LARGEST, DropoutArguments, Library, usable

STEPS = 1 << 16  # a rate is kept to this many steps
ALIGNED = 64  # windows begin at multiples of so many elements
ROOM = 1 << 14  # elements that a run has beside a quarter more than its first window
SPREAD = 0x9E3779B97F4A7C15  # between the states of two masks (SplitMix64; Steele et al. 2014)
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


class Masks:
    """The masks of one pass: a run of words for every rate and width, and windows into it."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, torch.dtype], Tensor] = {}
        self._used: set[tuple[int, torch.dtype, int]] = set()
        self._seed: int | None = None
        self._drawn = 0

    def dropped(self, p: float) -> DropoutArguments:
        """The next mask of this pass as a kernel makes it: from two numbers, whenever it is needed."""
        if self._seed is None:
            self._seed = int(torch.randint(1 << 62, ()))
        self._drawn += 1
        return DropoutArguments.of(p, _mixed(self._seed + self._drawn * SPREAD))

    def mask(self, x: Tensor, p: float) -> Mask:
        """The next mask of this pass for x: hashed by kernels that can number all of its elements, else kept words."""
        library = usable(x) if x.numel() < LARGEST else None
        if library is not None:
            return HashedMask(library, self.dropped(p))
        return KeptMask(self.like(x, p), 1.0 / kept_share(p))

    def like(self, x: Tensor, p: float) -> Tensor:
        """Words of x's width and shape: all ones where an element is kept (probability 1 - p), else zero."""
        key = (round(p * STEPS), WORDS[x.element_size()])
        if not enabled("dropout"):
            return torch.empty(x.shape, dtype=key[1]).bernoulli_(kept_share(p)).neg_()
        run, size = self._runs.get(key), x.numel()
        if run is None or run.numel() < size + size // 8 + ALIGNED:
            self._used = {used for used in self._used if used[:2] != key}
            run = self._runs[key] = _run(size + size // 4 + ROOM, *key)
        places = (run.numel() - size) // ALIGNED
        place = int(torch.randint(places, ()))
        while len(self._used) < places and (*key, place) in self._used:
            place = (place + 1) % places
        self._used.add((*key, place))
        return run[place * ALIGNED : place * ALIGNED + size].view(x.shape)


def _run(size: int, threshold: int, word: torch.dtype) -> Tensor:
    draws = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None)  # four elements a draw
    words = draws.view(torch.int16)[:size]
    first_kept = threshold - STEPS // 2
    return words.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1).neg_().to(word)  # 0 or 1, then 0 or -1


def _mixed(state: int) -> tuple[int, int]:
    """SplitMix64's output for a state, as two seeds of 32 bits."""
    z = state % (1 << 64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
    z ^= z >> 31
    return z >> 32, z % (1 << 32)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask's words are all ones, zero elsewhere. Not differentiable by itself."""
    return (x.view(mask.dtype) & mask).view(x.dtype)


class Mask(Protocol):
    """One mask, to be applied as often as it is needed."""

    @property
    def scale(self) -> float:
        """1 / (1 - p), which `of` leaves to the caller."""

    def of(self, x: Tensor) -> Tensor:
        """x where it is kept, zero elsewhere; any shape of as many elements."""

    def scaled(self, x: Tensor) -> Tensor:
        """The same, times `scale`."""


@dataclass(frozen=True)
class KeptMask:
    words: Tensor
    scale: float

    def of(self, x: Tensor) -> Tensor:
        return masked(x, self.words.view(x.shape))

    def scaled(self, x: Tensor) -> Tensor:
        return self.of(x).mul_(self.scale)


@dataclass(frozen=True)
class HashedMask:
    library: Library
    dropped: DropoutArguments

    @property
    def scale(self) -> float:
        return self.dropped.scale

    def of(self, x: Tensor) -> Tensor:
        return self.library.dropout(x.contiguous(), self.dropped, 1.0)

    def scaled(self, x: Tensor) -> Tensor:
        return self.library.dropout(x, self.dropped)


class _Dropout(torch.autograd.Function):
    """y = x mask / (1 - p), and dy likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        return mask.scaled(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.mask.scaled(gradients[0].contiguous()), None


def kept_share(p: float) -> float:
    """1 - p, as it is after rounding."""
    return 1.0 - round(p * STEPS) / STEPS


def dropout(x: Tensor, p: float, masks: Masks | None = None) -> Tensor:
    """x * mask / (1 - p). `masks` are those of the pass under way; new ones are drawn where it is left out."""
    if round(p * STEPS) == 0:
        return x
    if x.device.type != "cpu" or round(p * STEPS) == STEPS:
        return torch.nn.functional.dropout(x, p)
    y: Tensor = _Dropout.apply(x.contiguous(), (masks or Masks()).mask(x, p))  # type: ignore[no-untyped-call]
    return y
