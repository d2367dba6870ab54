"""The small operations between matrix products, each in one pass over memory (operations.inc.c)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from turret.ops.structs import NO_DROPOUT, AttentionRows, DropoutArguments, Prefixes

if TYPE_CHECKING:
    from ctypes import _NamedFuncPointer


# --- calls ------------------------------------------------------------------------------------------------------------
# Call a kernel of the loaded library: argument types, and the addresses of tensors.


# --- arguments --------------------------------------------------------------------------------------------------------
# Arguments of the kernels besides tensors, as C structs: rows, prefixes, adapter spans, KV cache, dropout.
#
# Each is made once a pass. Axes: B rows, N tokens of all rows, H heads, P prefix, D head size, S spans.


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix (O, E) in 8 bits, for `linear_int8`: integers, and a scale for each output."""

    bytes: Tensor  # (O E + 4 O,) uint8
    outputs: int  # O
    deep: int  # E
    dtype: torch.dtype  # of the original matrix


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
    if not varies and key in rows.memo:
        known: RowsStruct = rows.memo[key]
        return known
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
        rows.count,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        -(-longest // 32) * 32,
        most_prefix,
        longest * q.shape[0] * q.shape[1],
        *(each.data_ptr() for each in (rows.query_starts, rows.query_lengths, rows.key_starts, rows.key_lengths)),
        lengths.data_ptr(),
        *(each.data_ptr() for each in addresses),
        None if rows.bias is None else rows.bias.data_ptr(),
        0 if rows.bias is None else rows.bias.shape[1],
        rows.zero,
        rows.window,
        int(rows.causal),
        *dropped.seeds,
        dropped.threshold,
        dropped.scale,
        rows.scaling,
    )
    struct.tensors = [lengths, *addresses]
    if not varies:
        rows.memo[key] = struct
    return struct


# --- calls ------------------------------------------------------------------------------------------------------------


Argument: TypeAlias = (
    "int | float | ctypes.c_void_p | ctypes.c_long | ctypes.c_int | ctypes.c_uint32 | ctypes.c_float | None"
)

NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_LORA = (*(_LONG,) * 4, *(_POINTER,) * 3, ctypes.c_float, *(ctypes.c_uint32,) * 3)
DECLARED = {  # for kernels that are called once a layer: declared arguments may be plain Python numbers
    "low_rank": (_POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, ctypes.c_int),
    "lay_out": (_POINTER, _POINTER, _LONG, _LONG, ctypes.c_float, _POINTER),
    "linear": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, ctypes.c_int),
    "keep_step": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER),
    "attend_step": (
        *(_POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER),
        *(ctypes.c_float, _LONG, _POINTER, ctypes.c_int),
    ),
    "lora": (*_LORA, *(_POINTER,) * 3, ctypes.c_int),
    "lora_backward": (*_LORA, *(_POINTER,) * 7, ctypes.c_int),
    "round_int8": (*(_POINTER,) * 3, _LONG, _LONG, ctypes.c_int, ctypes.c_int),
    "linear_int8": (*(_POINTER,) * 5, _LONG, _LONG, _LONG, ctypes.c_int, _POINTER, ctypes.c_int),
    "encoder_layers": (_POINTER, _POINTER, _LONG, _LONG, *(_POINTER,) * 4, ctypes.c_int),
    "decoder_layers": (_POINTER, _LONG, _LONG, *(_POINTER,) * 4, _LONG, *(_POINTER,) * 3, ctypes.c_int),
}
RETURNED = dict.fromkeys(("linear_int8", "encoder_layers", "decoder_layers"), _LONG)


class Calls:
    """The loaded library. All tensors are on the CPU, of one dtype, and contiguous unless stated otherwise."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded
        self._tiles = bool(loaded.tiles())
        self.int8 = bool(loaded.int8())  # whether there is `linear_int8`
        self._functions: dict[tuple[str, torch.dtype], _NamedFuncPointer] = {}
        self._few = {dtype: int(getattr(loaded, f"linear_up_to_{name}")()) for dtype, name in NAMES.items()}

    def tiled(self, dtype: torch.dtype) -> bool:
        """Whether products use the processor's matrix tiles (AMX), which are about 8x faster."""
        return self._tiles and dtype == torch.bfloat16

    def _call(self, name: str, dtype: torch.dtype, *arguments: Argument) -> None:
        """Call a kernel."""
        self._function(name, dtype)(*arguments)

    def _workspace(self, name: str, dtype: torch.dtype, *arguments: Argument) -> int:
        """Call a kernel without a workspace: it computes nothing and returns the bytes that it needs."""
        return int(self._function(name, dtype)(*arguments))

    def _function(self, name: str, dtype: torch.dtype) -> _NamedFuncPointer:
        function = self._functions.get((name, dtype))
        if function is None:
            function = getattr(self._loaded, f"{name}_{NAMES[dtype]}")
            function.argtypes, function.restype = DECLARED.get(name), RETURNED.get(name)
            self._functions[name, dtype] = function
        return function


def p(x: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def n(x: Tensor) -> ctypes.c_long:
    """The number of elements of a tensor."""
    return ctypes.c_long(x.numel())


def at(spans: AdapterSpans | None) -> int | None:
    """The address of the spans."""
    return None if spans is None else spans.address


def threads() -> ctypes.c_int:
    """The number of threads that torch uses."""
    return ctypes.c_int(torch.get_num_threads())


# --- operations -------------------------------------------------------------------------------------------------------


class Operations(Calls):
    """Activations, dropout, norms and rotary positions, with their gradients."""

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        y = torch.empty_like(gate)
        self._call("swiglu", gate.dtype, n(gate), p(gate), p(up), p(y), threads())
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(dgate, dup)."""
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self._call("swiglu_backward", gate.dtype, n(gate), p(gate), p(up), p(dy), p(dgate), p(dup), threads())
        return dgate, dup

    def gelu(self, x: Tensor) -> Tensor:
        """x Phi(x), where Phi is the cumulative normal distribution."""
        y = torch.empty_like(x)
        self._call("gelu", x.dtype, n(x), p(x), p(y), threads())
        return y

    def gelu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """dx."""
        dx = torch.empty_like(x)
        self._call("gelu_backward", x.dtype, n(x), p(x), p(dy), p(dx), threads())
        return dx

    def dropout(self, x: Tensor, dropped: DropoutArguments, scale: float | None = None) -> Tensor:
        """Kept elements times `scale` (default: 1 / (1 - p)), zero elsewhere."""
        y = torch.empty_like(x)
        by = ctypes.c_float(dropped.scale if scale is None else scale)
        first, second = (ctypes.c_uint32(seed) for seed in dropped.seeds)
        self._call(
            "dropout", x.dtype, n(x), p(x), p(y), first, second, ctypes.c_uint32(dropped.threshold), by, threads()
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(weight * x r, r), r = 1 / sqrt(mean(x^2) + eps). x: (..., D), r: (...) float32."""
        width = x.shape[-1]
        y, r = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        rows = ctypes.c_long(r.numel())
        self._call(
            "rms_norm",
            x.dtype,
            rows,
            ctypes.c_long(width),
            p(x),
            p(weight),
            ctypes.c_float(eps),
            p(y),
            p(r),
            threads(),
        )
        return y, r

    def rms_norm_backward(self, x: Tensor, weight: Tensor, r: Tensor, dy: Tensor) -> Tensor:
        """dx."""
        dx = torch.empty_like(x)
        rows, width = ctypes.c_long(r.numel()), ctypes.c_long(x.shape[-1])
        self._call("rms_norm_backward", x.dtype, rows, width, p(x), p(weight), p(r), p(dy), p(dx), threads())
        return dx

    def added_norm(
        self, a: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(LayerNorm(s), s, stats), s = dropout(a) + x. stats: (..., 2) float32, mean and 1 / deviation of each row."""
        s, y, stats = torch.empty_like(a), torch.empty_like(a), torch.empty(*a.shape[:-1], 2, dtype=torch.float32)
        rows, width = ctypes.c_long(stats.numel() // 2), ctypes.c_long(a.shape[-1])
        self._call(
            "added_norm",
            a.dtype,
            rows,
            width,
            *map(p, (a, x, weight, bias)),
            ctypes.c_float(eps),
            *_mask(dropped),
            *map(p, (s, y, stats)),
            threads(),
        )
        return y, s, stats

    def added_norm_again(self, s: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> Tensor:
        """LayerNorm(s) again, bit-equal to the result of `added_norm`, from its s and stats."""
        y = torch.empty_like(s)
        rows, width = ctypes.c_long(stats.numel() // 2), ctypes.c_long(s.shape[-1])
        self._call("added_norm_again", s.dtype, rows, width, *map(p, (s, weight, bias, stats, y)), threads())
        return y

    def added_norm_backward(
        self, s: Tensor, weight: Tensor, stats: Tensor, dropped: DropoutArguments, dy: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(da, dx)."""
        da, dx = torch.empty_like(s), torch.empty_like(s)
        rows, width = ctypes.c_long(stats.numel() // 2), ctypes.c_long(s.shape[-1])
        self._call(
            "added_norm_backward",
            s.dtype,
            rows,
            width,
            *map(p, (s, weight, stats, dy)),
            *_mask(dropped),
            p(da),
            p(dx),
            threads(),
        )
        return da, dx

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        """Rotary positions: x cos + rotate_half(x) sin with sign = 1, the gradient with sign = -1.

        Args:
            x: (N, H, D), the last axis contiguous.
            cos: (N, D)
            sin: (N, D)
            sign: 1.0 or -1.0.

        Returns:
            (N, H, D), contiguous.
        """
        tokens, heads, dim = x.shape
        y = x.new_empty(tokens, heads, dim)
        self._call(
            "rotate",
            x.dtype,
            *map(ctypes.c_long, (tokens, heads, dim)),
            p(x),
            *map(ctypes.c_long, x.stride()[:2]),
            p(cos),
            p(sin),
            ctypes.c_float(sign),
            p(y),
            threads(),
        )
        return y


def _mask(dropped: DropoutArguments) -> tuple[ctypes.c_uint32 | ctypes.c_float, ...]:
    """(seed, other seed, threshold, scale)."""
    return *map(ctypes.c_uint32, (*dropped.seeds, dropped.threshold)), ctypes.c_float(dropped.scale)
