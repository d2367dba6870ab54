"""What the kernels are told beside tensors: rows, prefixes, spans of adapters, a cache, dropout, as C reads them.

Each of them is made once a pass. Refuses to know what is computed. Axes: B rows, N tokens of all rows, H heads, P
prefix, D head size, S spans.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Seeds = tuple[int, int]
STEPS = 1 << 16  # a rate is kept to this many steps
LARGEST = 1 << 32  # elements a mask can number


@dataclass(frozen=True)
class DropoutArguments:
    """Dropout as a kernel needs it: an element is kept where its random word reaches the threshold."""

    seeds: Seeds
    threshold: int  # of STEPS
    scale: float  # 1 / (1 - p)

    @classmethod
    def of(cls, p: float, seeds: Seeds) -> DropoutArguments:
        threshold = min(round(p * STEPS), STEPS - 1)
        return cls(seeds, threshold, 1.0 / (1.0 - threshold / STEPS))


NO_DROPOUT = DropoutArguments((0, 0), 0, 1.0)


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix (O, E) in 8 bits as `linear_int8` multiplies by it: whole numbers, and a scale for every output."""

    bytes: Tensor  # (O E + 4 O,) uint8
    outputs: int
    deep: int
    dtype: torch.dtype  # of what it was


@dataclass(frozen=True)
class AttentionRows:
    """Where each row of an unpadded batch lies, and what its queries may look at.

    All int64 on the CPU, (B,). window: 0 for none, else |key - query| < window. bias: (H, W) float32 by key - query,
    its zero at column `zero`; keys of a prefix are at -P … -1.
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
    all_asked: bool = True  # else some tokens are in no row's queries: their y is not written, their dq is zero
    told: dict[tuple[object, ...], tuple[_Words, list[Tensor]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        return self.query_starts.shape[0]

    @property
    def longest_query(self) -> int:
        return int(self.query_lengths.max())

    @functools.cached_property  # asked by every layer of a pass
    def longest_key(self) -> int:
        return int(self.key_lengths.max())

    @functools.cached_property
    def no_prefixes(self) -> Tensor:
        return torch.zeros(self.count, dtype=torch.int64)


@dataclass(frozen=True)
class Prefixes:
    """pairs: keys and values (H_kv, P, D), contiguous; of_row: which pair each row has, or None."""

    pairs: Sequence[tuple[Tensor, Tensor]]
    of_row: Sequence[int | None]


class AdapterSpans:
    """Which tokens of a pass take which factors: made once a pass, read by every layer.

    starts, ends, ranks: (S,) int64; factors: (S, L, 2) int64, the addresses of A (R, D_in) and of the scaled
    B (R, D_out), both contiguous, zeros for a layer without; who makes it keeps alive what is there. tokens: N.
    """

    def __init__(self, starts: Tensor, ends: Tensor, ranks: Tensor, factors: Tensor, tokens: int) -> None:
        assert factors.is_contiguous()
        assert len(factors) == len(starts) == len(ends) == len(ranks)
        self._kept = (starts, ends, ranks, factors)
        self.tokens, self.layers = tokens, factors.shape[1]
        addresses = (each.data_ptr() for each in self._kept)
        self.words = _SpanWords(len(starts), self.layers, tokens, *addresses)
        self.address = ctypes.addressof(self.words)


class CachedKVArguments:
    """What a cache holds of some rows as the kernels of a step read it: made once a pass, read by every layer.

    lengths, prefixes: (B,) int64 on the CPU, the newest token counted; like: (B, H_kv, S, D), a layer's keys or values,
    whose strides all layers have. A token's D numbers lie together, and a head's tokens behind one another.
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
        self.words = _KeptWords(rows, kv_heads, dim, *like.stride()[:2], most, *addresses)
        self.address = ctypes.addressof(self.words)

    def require(self, *tensors: Tensor) -> None:
        for each in tensors:
            assert (*each.shape[:2], each.shape[3]) == self.shape
            assert each.stride() == self.strides


class PartWords(ctypes.Structure):
    """`struct part` of products.inc.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("held", "keys", "values"))


class _SpanWords(ctypes.Structure):
    """`struct spans` of products.inc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("count", "layers", "tokens")),
        *((name, ctypes.c_void_p) for name in ("starts", "ends", "ranks", "factors")),
    )


class _KeptWords(ctypes.Structure):
    """`struct held` of products.inc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "kv_heads", "dim", "lane", "head", "most")),
        *((name, ctypes.c_void_p) for name in ("lengths", "prefixes")),
    )


class _Words(ctypes.Structure):
    """`struct rows` of products.inc.c."""

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


def words_of(
    rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
) -> tuple[_Words, list[Tensor]]:
    """The struct, and what must live as long as it does; kept with the rows where neither is one layer's own."""
    own = bool(prefixes.pairs) or dropped is not NO_DROPOUT
    alike = () if own else (*(each.shape for each in (q, k)), *(each.stride() for each in (q, k, v)))
    if not own and alike in rows.told:
        return rows.told[alike]
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
        raise ValueError("the bias does not reach the prefix")
    words = _Words(
        rows.count, q.shape[1], k.shape[1], q.shape[2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        -(-longest // 32) * 32, most_prefix, longest * q.shape[0] * q.shape[1],
        *(each.data_ptr() for each in (rows.query_starts, rows.query_lengths, rows.key_starts, rows.key_lengths)),
        lengths.data_ptr(), *(each.data_ptr() for each in addresses),
        None if rows.bias is None else rows.bias.data_ptr(),
        0 if rows.bias is None else rows.bias.shape[1], rows.zero, rows.window, int(rows.causal), *dropped.seeds,
        dropped.threshold, dropped.scale, rows.scaling,
    )  # fmt: skip
    if not own:
        rows.told[alike] = words, [lengths, *addresses]
    return words, [lengths, *addresses]
