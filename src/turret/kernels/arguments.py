"""Arguments of the kernels besides tensors, as C structs: rows, prefixes, adapter spans, KV cache, dropout.

Each is made once a pass. Axes: B rows, N tokens of all rows, H heads, P prefix, D head size, S spans.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Seeds = tuple[int, int]
STEPS = 1 << 16  # resolution of a dropout rate
LARGEST = 1 << 32  # most elements that a dropout mask can number


@dataclass(frozen=True)
class DropoutArguments:
    """Dropout: an element is kept if its random word reaches the threshold."""

    seeds: Seeds
    threshold: int  # of STEPS
    scale: float  # 1 / (1 - p)

    @classmethod
    def of(cls, p: float, seeds: Seeds) -> DropoutArguments:
        """Dropout with probability p, rounded to 1 / STEPS."""
        threshold = min(round(p * STEPS), STEPS - 1)
        return cls(seeds, threshold, 1.0 / (1.0 - threshold / STEPS))


NO_DROPOUT = DropoutArguments((0, 0), 0, 1.0)


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix (O, E) in 8 bits, for `linear_int8`: integers, and a scale for each output."""

    bytes: Tensor  # (O E + 4 O,) uint8
    outputs: int  # O
    deep: int  # E
    dtype: torch.dtype  # of the original matrix


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
    structs: dict[tuple[tuple[int, ...], ...], RowsStruct] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        """B"""
        return self.query_starts.shape[0]

    @property
    def longest_query(self) -> int:
        return int(self.query_lengths.max())

    @functools.cached_property  # every layer of a pass reads it
    def longest_key(self) -> int:
        return int(self.key_lengths.max())

    @functools.cached_property
    def no_prefixes(self) -> Tensor:
        return torch.zeros(self.count, dtype=torch.int64)


@dataclass(frozen=True)
class Prefixes:
    """The prefixes of a batch. pairs: keys and values (H_kv, P, D), contiguous; of_row: each row's pair, or None."""

    pairs: Sequence[tuple[Tensor, Tensor]]
    of_row: Sequence[int | None]


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


class CachedKVArguments:
    """The rows of a KV cache that a decode step reads, the same for every layer.

    Args:
        lengths: (B,) int64 on the CPU, including the newest token.
        prefixes: (B,) int64 on the CPU, tokens of each prefix.
        like: (B, H_kv, S, D), a layer's keys or values. All layers have its strides; S and D are contiguous.
    """

    def __init__(self, lengths: Tensor, prefixes: Tensor, like: Tensor) -> None:
        rows, kv_heads, longest, dim = like.shape
        assert like.stride()[2:] == (dim, 1)
        assert len(lengths) == len(prefixes) == rows
        most = int(lengths.max())
        assert most <= longest
        self.shape, self.strides = (rows, kv_heads, dim), like.stride()
        self._lengths = lengths, prefixes
        addresses = (each.data_ptr() for each in self._lengths)
        self._struct = _CachedStruct(rows, kv_heads, dim, *like.stride()[:2], most, *addresses)
        self.address = ctypes.addressof(self._struct)

    def require(self, *tensors: Tensor) -> None:
        """Check that tensors have the shape and strides of `like`."""
        for each in tensors:
            assert (*each.shape[:2], each.shape[3]) == self.shape
            assert each.stride() == self.strides


class PartStruct(ctypes.Structure):
    """`struct part` of products.inc.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("held", "keys", "values"))


class _SpansStruct(ctypes.Structure):
    """`struct spans` of products.inc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("count", "layers", "tokens")),
        *((name, ctypes.c_void_p) for name in ("starts", "ends", "ranks", "factors")),
    )


class _CachedStruct(ctypes.Structure):
    """`struct held` of products.inc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "kv_heads", "dim", "lane", "head", "most")),
        *((name, ctypes.c_void_p) for name in ("lengths", "prefixes")),
    )


class RowsStruct(ctypes.Structure):
    """`struct rows` of products.inc.c."""

    tensors: list[Tensor]  # C reads their memory

    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "heads", "kv_heads", "dim")),
        *((name, ctypes.c_long) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        *((name, ctypes.c_long) for name in ("most", "most_prefix", "work")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "query_lengths", "key_starts", "key_lengths")),
        *((name, ctypes.c_void_p) for name in ("prefix_lengths", "prefix_keys", "prefix_values", "bias")),
        *((name, ctypes.c_long) for name in ("bias_width", "bias_zero", "window")),
        ("causal", ctypes.c_int),
        *((name, ctypes.c_uint32) for name in ("seed", "other", "threshold")),
        *((name, ctypes.c_float) for name in ("scale", "scaling")),
    )


def rows_struct(
    rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
) -> RowsStruct:
    """The struct for these tensors. It is cached with the rows if it depends on neither prefixes nor dropout."""
    varies = bool(prefixes.pairs) or dropped is not NO_DROPOUT
    key = (q.shape, k.shape, q.stride(), k.stride(), v.stride())
    if not varies and key in rows.structs:
        return rows.structs[key]
    for each in (q, k, v):
        assert each.stride(-1) == 1
    if prefixes.pairs:
        pairs = [None if place is None else prefixes.pairs[place] for place in prefixes.of_row]
        lengths = torch.tensor([0 if pair is None else pair[0].shape[1] for pair in pairs])
        addresses = [torch.tensor([0 if pair is None else pair[side].data_ptr() for pair in pairs]) for side in (0, 1)]
        longest, most_prefix = int((rows.key_lengths + lengths).max()), int(lengths.max())
    else:
        lengths = rows.no_prefixes
        addresses, longest, most_prefix = [lengths, lengths], rows.longest_key, 0
    if rows.bias is not None and rows.zero < most_prefix + rows.longest_query:
        raise ValueError("the bias has no columns for the whole prefix")
    struct = RowsStruct(
        rows.count, q.shape[1], k.shape[1], q.shape[2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        -(-longest // 32) * 32, most_prefix, longest * q.shape[0] * q.shape[1],
        *(each.data_ptr() for each in (rows.query_starts, rows.query_lengths, rows.key_starts, rows.key_lengths)),
        lengths.data_ptr(), *(each.data_ptr() for each in addresses),
        None if rows.bias is None else rows.bias.data_ptr(),
        0 if rows.bias is None else rows.bias.shape[1], rows.zero, rows.window, int(rows.causal), *dropped.seeds,
        dropped.threshold, dropped.scale, rows.scaling,
    )  # fmt: skip
    struct.tensors = [lengths, *addresses]
    if not varies:
        rows.structs[key] = struct
    return struct
