"""What operations take besides tensors: the rows of a batch, prefixes, dropout, and what LoRA adds to a matrix.

Axes: B rows, N tokens of all rows, H heads, P prefix, D head size, R rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

GRADIENT_STAYS = "turret_gradient_stays"  # an attribute of a parameter that keeps its `grad` from step to step
STEPS = 1 << 16  # resolution of a dropout rate
WORD = 0xFFFFFFFF
OF_SITE, OF_SEED, OF_HEAD = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D  # odd numbers, so that all bits of each count
FIRST_MIX, SECOND_MIX = 0x7FEB352D, 0x846CA68B


def kept_gradient(parameter: Tensor) -> Tensor | None:
    """The gradient to which a backward pass adds in place, None where it has to return a gradient."""
    return parameter.grad if getattr(parameter, GRADIENT_STAYS, False) else None


@dataclass(frozen=True, eq=False)
class DropoutArguments:
    """The mask of one site in one pass: an element is kept if the hash of its place reaches the threshold.

    keys: (N,) int64 of each token, or of each example. They name the example and the token in it, so a mask does not
    depend on the rest of the pass. scale: 1 / (1 - p).
    """

    seed: int  # of the site, below 2^32
    threshold: int  # of STEPS
    scale: float
    keys: Tensor | None
    memo: dict[torch.Size, Tensor] = field(default_factory=dict, repr=False)  # for the backward pass

    @classmethod
    def of(cls, p: float, seed: int, keys: Tensor) -> DropoutArguments:
        """Dropout with probability p, rounded to 1 / STEPS."""
        threshold = min(round(p * STEPS), STEPS - 1)
        return cls(seed, threshold, 1.0 / (1.0 - threshold / STEPS), keys)

    def keep_mask(self, shape: torch.Size) -> Tensor:
        """The mask in torch: (..., D) bool, with a key for each row of `shape`, or for each (B, T) of (B, H, T, D)."""
        if shape not in self.memo:
            keys, rows = self.keys, shape[:-1].numel()
            assert keys is not None
            if keys.numel() == rows:
                self.memo[shape] = dropout_mask(keys.flatten(), self.seed, self.threshold, shape[-1]).view(shape)
            else:
                keys = keys.view(shape[0], shape[2])
                self.memo[shape] = dropout_mask(keys, self.seed, self.threshold, shape[3], heads=shape[1])
        return self.memo[shape]


def dropout_mask(keys: Tensor, seed: int, threshold: int, width: int, heads: int = 0) -> Tensor:
    """Which elements dropout keeps: those whose hash of 16 bits reaches the threshold. The same as the kernels' mask.

        x = ((key mod 2^32) xor seed) + OF_HEAD head + word,    y = key / 2^32 + OF_SEED seed,    all modulo 2^32
        x <- FIRST_MIX (x xor x / 2^16);    x <- SECOND_MIX (x xor x / 2^15 xor y);    x <- x xor x / 2^16

    Word 16 i + j decides the columns 32 i + j, by its low half, and 32 i + j + 16.

    Args:
        keys: (..., T) int64.
        seed: of the site, below 2^32.
        threshold: p 2^16.
        width: D, the columns.
        heads: H of attention; 0 for none.

    Returns:
        (..., T, D) bool, or (..., H, T, D).
    """
    blocks, device = -(-width // 32), keys.device
    x = (keys ^ seed).to(torch.int32)  # the low half; products and sums of int32 wrap around
    y = (keys >> 32).to(torch.int32) + _int32(seed * OF_SEED)
    if heads:
        x = x[..., None, :] + (torch.arange(heads, device=device) * OF_HEAD).to(torch.int32)[:, None]
        y = y[..., None, :]
    x = x[..., None] + torch.arange(16 * blocks, dtype=torch.int32, device=device)
    x.bitwise_xor_(_shift_right(x, 16)).mul_(_int32(FIRST_MIX))
    x.bitwise_xor_(_shift_right(x, 15).bitwise_xor_(y[..., None])).mul_(_int32(SECOND_MIX))
    high = _shift_right(x, 16)
    halves = torch.empty(*x.shape[:-1], blocks, 2, 16, dtype=torch.bool, device=device)
    words = (*x.shape[:-1], blocks, 16)
    torch.ge(x.bitwise_xor_(high).bitwise_and_(WORD >> 16).view(words), threshold, out=halves[..., 0, :])
    torch.ge(high.view(words), threshold, out=halves[..., 1, :])
    return halves.flatten(-3)[..., :width]


def _int32(word: int) -> int:
    """32 bits as a number of int32."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """x / 2^bits of 32 bits without a sign."""
    return (x >> bits).bitwise_and_(WORD >> bits)


NO_DROPOUT = DropoutArguments(0, 0, 1.0, None)


@dataclass(frozen=True)
class AttentionRows:
    """The place of each row in an unpadded batch, and which keys its queries see.

    The tensors are int64 on the CPU, (B,). window: 0 for none, else |key - query| < window. bias: (H, W) float32 by
    key - query, whose zero is at column `zero`; the keys of a prefix are at -P … -1.
    """

    query_starts: Tensor
    query_lengths: Tensor
    key_starts: Tensor
    key_lengths: Tensor
    scaling: float
    causal: bool
    window: int = 0
    bias: Tensor | None = None
    zero: int = 0
    all_asked: bool = True  # False: some tokens are no queries; their y is not written, their dq is zero
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)  # what a device makes of them


@dataclass(frozen=True)
class Prefixes:
    """The prefixes of a batch. pairs: keys and values (H_kv, P, D), contiguous; of_row: each row's pair, or None."""

    pairs: Sequence[tuple[Tensor, Tensor]]
    of_row: Sequence[int | None]


class BaseProducts(Protocol):
    """The products of a frozen matrix W (D_out, D_in) with rows of tokens."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b: (N, D_in) -> (N, D_out), a new tensor."""

    def backward(self, dy: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
        """dy W + plus: (N, D_out) -> (N, D_in). plus may be changed in place."""


class AdapterSpans:
    """The LoRA factors of each span of tokens in a pass, for every layer.

    Args:
        starts: (S,) int64, the first token of each span.
        ends: (S,) int64, one past the last token.
        ranks: (S,) int64.
        factors: (S, L, 2) int64, addresses of A (R, D_in) and of the scaled B (R, D_out), contiguous; zeros for a
            layer without factors. The caller keeps these tensors alive.
        tokens: N.
    """

    def __init__(self, starts: Tensor, ends: Tensor, ranks: Tensor, factors: Tensor, tokens: int) -> None:
        assert factors.is_contiguous()
        assert len(factors) == len(starts) == len(ends) == len(ranks)
        self._tensors = (starts, ends, ranks, factors)  # C reads their memory
        self.tokens, self.layers = tokens, factors.shape[1]
        addresses = (each.data_ptr() for each in self._tensors)
        self._struct = _SpansStruct(len(starts), self.layers, tokens, *addresses)
        self.address = ctypes.addressof(self._struct)


class _SpansStruct(ctypes.Structure):
    """`struct spans` of products.inc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("count", "layers", "tokens")),
        *((name, ctypes.c_void_p) for name in ("starts", "ends", "ranks", "factors")),
    )


class Lora(NamedTuple):
    """What LoRA adds to a frozen matrix: scale ((x mask) A^T) B^T. A: (R, D_in), B: (D_out, R), float32.

    p: rate of dropout. dropped: the mask of this pass, drawn at that rate.
    """

    A: Tensor
    B: Tensor
    scaling: float
    p: float = 0.0
    dropped: DropoutArguments = NO_DROPOUT

    @property
    def scale(self) -> float:
        """With the 1 / (1 - p) of dropout."""
        return self.scaling * self.dropped.scale


class Matrix(NamedTuple):
    """A frozen linear layer: W (D_out, D_in), its bias, how it multiplies, and the LoRA of the adapter that trains."""

    weight: Tensor
    bias: Tensor | None
    base: BaseProducts
    lora: Lora | None = None


Group = tuple[Matrix, ...]  # the matrices of one input


class RMSNorm(NamedTuple):
    """y = w x / sqrt(mean(x^2) + eps). weight: (D,)"""

    weight: Tensor
    eps: float


class LayerNorm(NamedTuple):
    """y = w (s - mean(s)) / sqrt(var(s) + eps) + b, s = dropout(a) + x. weight, bias: (D,)"""

    weight: Tensor
    bias: Tensor
    eps: float
    dropped: DropoutArguments = NO_DROPOUT  # of the branch a that is added before the norm
