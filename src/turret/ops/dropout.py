"""Dropout that costs less than the layer it guards.

    y = x * mask / (1 - p),    mask ~ Bernoulli(1 - p) an element, p rounded to 1/65536

On the CPU torch draws one double for each element, which in attention takes longer than the two matrix products beside
it. Here 16 random bits decide an element.

- With kernels no mask is saved: an element's bits are a hash of its index and two seeds, computed again in the backward
  pass.
- Else a mask is a word of all ones or all zeros for each element, as wide as the element, applied by one bitwise `and`.
  The masks of one pass are windows into one run of such words, at random places, so no layer saves a mask of its own.
  Two masks are independent at every element unless they start at the same place, which is avoided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from turret.ops.autograd import FunctionContext, Gradients, apply
from turret.ops.core import Ops, enabled
from turret.ops.structs import LARGEST, NO_DROPOUT, STEPS, DropoutArguments, Mask
from turret.ops.table import of

ALIGNED = 64  # elements; windows begin at multiples of it
ROOM = 1 << 14  # elements of a run beyond 5/4 of its first window
SPREAD = 0x9E3779B97F4A7C15  # between the states of two masks (SplitMix64; Steele et al. 2014)
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


class Masks:
    """The masks of one pass: one run of words for each rate and width, and windows into it."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, torch.dtype], Tensor] = {}
        self._used: set[tuple[int, torch.dtype, int]] = set()
        self._seed: int | None = None
        self._drawn = 0

    def copy(self) -> Masks:
        """The same state: both draw the same masks from here on."""
        twin = Masks()
        twin._runs, twin._used = dict(self._runs), set(self._used)
        twin._seed, twin._drawn = self._seed, self._drawn
        return twin

    def arguments(self, p: float) -> DropoutArguments:
        """The next mask of this pass for a kernel, which computes it from two seeds whenever it needs it."""
        if p <= 0.0:
            return NO_DROPOUT
        if self._seed is None:
            self._seed = int(torch.randint(1 << 62, ()))
        self._drawn += 1
        return DropoutArguments.of(p, _mixed(self._seed + self._drawn * SPREAD))

    def mask(self, x: Tensor, p: float) -> Mask:
        """The next mask of this pass for x: hashed by a kernel if it can index all elements, else words."""
        ops = of(x)
        if ops.hashes and x.numel() < LARGEST:
            return HashedMask(ops, self.arguments(p))
        if not x.is_cpu:
            kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
            return KeptMask(kept, 1.0 / (1.0 - p))
        return WordMask(self.like(x, p), 1.0 / keep_rate(p))

    def like(self, x: Tensor, p: float) -> Tensor:
        """Words of x's element size and shape: all ones with probability 1 - p, else zero."""
        key = (round(p * STEPS), WORDS[x.element_size()])
        if not enabled("dropout"):
            return torch.empty(x.shape, dtype=key[1]).bernoulli_(keep_rate(p)).neg_()
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


@dataclass(frozen=True)
class WordMask:
    """words: of x's element size, all ones where an element stays, else zero."""

    words: Tensor
    scale: float
    dropped: DropoutArguments | None = None

    def of(self, x: Tensor) -> Tensor:
        return masked(x, self.words.view(x.shape))

    def scaled(self, x: Tensor) -> Tensor:
        return self.of(x).mul_(self.scale)


@dataclass(frozen=True)
class HashedMask:
    """The kernels compute the mask from two seeds whenever it is applied."""

    ops: Ops
    dropped: DropoutArguments

    @property
    def scale(self) -> float:
        return self.dropped.scale

    def of(self, x: Tensor) -> Tensor:
        return self.ops.dropout(x.contiguous(), self.dropped, 1.0)

    def scaled(self, x: Tensor) -> Tensor:
        return self.ops.dropout(x, self.dropped, self.dropped.scale)


@dataclass(frozen=True)
class KeptMask:
    """On another device than the CPU. kept: whether an element stays; its size is a byte."""

    kept: Tensor
    scale: float
    dropped: DropoutArguments | None = None

    def of(self, x: Tensor) -> Tensor:
        return x * self.kept.view(x.shape)

    def scaled(self, x: Tensor) -> Tensor:
        return self.of(x).mul_(self.scale)


class _DropoutContext(FunctionContext, Protocol):
    mask: Mask


class _Dropout(torch.autograd.Function):
    """y = x mask / (1 - p);  dx = dy mask / (1 - p)."""

    @staticmethod
    def forward(ctx: _DropoutContext, x: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        return mask.scaled(x)

    @staticmethod
    def backward(ctx: _DropoutContext, *gradients: Tensor) -> Gradients:
        return ctx.mask.scaled(gradients[0].contiguous()), None


def keep_rate(p: float) -> float:
    """1 - p, after rounding."""
    return 1.0 - round(p * STEPS) / STEPS


def dropout(x: Tensor, p: float, masks: Masks | None = None) -> Tensor:
    """x * mask / (1 - p). masks: those of the current pass; None draws new ones."""
    if round(p * STEPS) == 0:
        return x
    if x.device.type != "cpu" or round(p * STEPS) == STEPS:
        return torch.nn.functional.dropout(x, p)
    return apply(_Dropout, x.contiguous(), (masks or Masks()).mask(x, p))
