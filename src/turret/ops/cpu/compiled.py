"""The operations of a CPU: by the kernels in C where they are faster than torch.

`library()` has the kernels of this process. Shapes and strides are checked here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import starmap
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor

from turret.ops.core import (
    REFERENCE,
    KVStep,
    LayerWeights,
    Loras,
    NumberedMatrix,
    Ops,
    attention_by_rows,
    is_enabled,
    seeded_randn,
)
from turret.ops.cpu.build import NotBuilt, load
from turret.ops.structs import (
    NO_DROPOUT,
    AdapterSpans,
    AttentionRows,
    DropoutArguments,
    LayerNorm,
    Lora,
    Prefixes,
    RMSNorm,
)

if TYPE_CHECKING:
    from ctypes import _NamedFuncPointer


# --- arguments --------------------------------------------------------------------------------------------------------
# Arguments of the kernels besides tensors, as C structs: rows, prefixes, adapter spans, KV cache, dropout.
#
# Each is made once a pass. Axes: B rows, N tokens of all rows, H heads, P prefix, D head size, S spans.


class PartStruct(ctypes.Structure):
    """`struct part` of products.inc.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("held", "keys", "values"))


class _CachedStruct(ctypes.Structure):
    """`struct held` of products.inc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "kv_heads", "dim", "lane", "head", "most")),
        *((name, ctypes.c_void_p) for name in ("lengths", "prefixes")),
    )


class _MaskStruct(ctypes.Structure):
    """`struct mask` of kernels.c."""

    _fields_ = (("keys", ctypes.c_void_p), ("seed", ctypes.c_uint32), ("threshold", ctypes.c_uint32))


_Mask: TypeAlias = "ctypes._Pointer[_MaskStruct]"


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
        ("mask", _MaskStruct),
        *((name, ctypes.c_float) for name in ("scale", "scaling")),
    )


def rows_struct(
    rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
) -> RowsStruct:
    """The struct for these tensors. It is cached with the rows if it depends on neither prefixes nor dropout."""
    varies = bool(prefixes.pairs) or dropped is not NO_DROPOUT
    key = (q.shape, k.shape, q.stride(), k.stride(), v.stride())
    if not varies and key in rows.memo:
        return rows.memo[key]
    for each in (q, k, v):
        assert each.stride(-1) == 1
    queries, keys = _ends(rows)
    if queries > len(q) or keys > len(k) or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"attention got {[*q.shape]}, {[*k.shape]} and {[*v.shape]} for {queries} tokens")
    if prefixes.pairs:
        pairs = [None if place is None else prefixes.pairs[place] for place in prefixes.of_row]
        lengths = torch.tensor([0 if pair is None else pair[0].shape[1] for pair in pairs])
        addresses = [torch.tensor([0 if pair is None else pair[side].data_ptr() for pair in pairs]) for side in (0, 1)]
        longest, most_prefix = int((rows.key_lengths + lengths).max()), int(lengths.max())
    else:
        longest, lengths = _without_prefixes(rows)
        addresses, most_prefix = [lengths, lengths], 0
    if rows.bias is not None and rows.zero < most_prefix + int(rows.query_lengths.max()):
        raise ValueError("the bias has no columns for the whole prefix")
    struct = RowsStruct(
        len(rows.query_starts),
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
        _mask_struct(dropped, len(q)),
        dropped.scale,
        rows.scaling,
    )
    struct.tensors = [lengths, *addresses]
    if not varies:
        rows.memo[key] = struct
    return struct


def _mask_struct(dropped: DropoutArguments, tokens: int) -> _MaskStruct:
    keys = dropped.keys
    if keys is None:
        return _MaskStruct(None, 0, 0)
    assert keys.shape == (tokens,), "dropout has a key for each token"
    return _MaskStruct(keys.data_ptr(), dropped.seed, dropped.threshold)


def _mask(dropped: DropoutArguments, x: Tensor) -> _Mask | None:
    """The mask of x (..., D), or None if there is no dropout."""
    return ctypes.pointer(_mask_struct(dropped, x.numel() // x.shape[-1])) if dropped.threshold else None


def _ends(rows: AttentionRows) -> tuple[int, int]:
    """One past the last query and the last key."""
    known: tuple[int, int] | None = rows.memo.get("ends")
    if known is None:
        known = int((rows.query_starts + rows.query_lengths).max()), int((rows.key_starts + rows.key_lengths).max())
        rows.memo["ends"] = known
    return known


def _without_prefixes(rows: AttentionRows) -> tuple[int, Tensor]:
    """The most keys of a row, and the length of each row's prefix, all 0: the same for every layer of a pass."""
    known: tuple[int, Tensor] | None = rows.memo.get("without prefixes")
    if known is None:
        known = int(rows.key_lengths.max()), torch.zeros(len(rows.key_lengths), dtype=torch.int64)
        rows.memo["without prefixes"] = known
    return known


# --- layers -----------------------------------------------------------------------------------------------------------
# The frozen weights of whole layers, for the kernels that compute several layers in one call.
#
# They are made once, checked here, and keep their tensors alive, so a call checks only its inputs.


class Layer:
    """A layer with weights of one dtype, all contiguous.

    Args:
        matrices: Linear layers, weight (D_out, D_in) and bias (D_out,) or none; queries and keys come first.
        others: Other tensors.
        dim: Head size.
    """

    struct: ctypes.Structure

    def __init__(self, matrices: Sequence[NumberedMatrix], others: Sequence[Tensor | None], dim: int) -> None:
        tensors = [*others, *(each for _, weight, bias in matrices for each in (weight, bias))]
        self._tensors = [each for each in tensors if each is not None]  # C reads their memory
        query, key = (weight.shape for _, weight, _ in matrices[:2])
        self.dtype, self.width, self.dim = matrices[0][1].dtype, query[1], dim
        self.heads, self.kv_heads = query[0] // dim, key[0] // dim
        # equal for all layers of one call; cached, because every layer compares it in every pass
        self.alike = type(self), self.dtype, self.width, self.heads, self.kv_heads, self.dim
        assert query[0] % dim == key[0] % dim == 0
        assert all(each.dtype == self.dtype and each.is_contiguous() and each.is_cpu for each in self._tensors)
        assert all(bias is None or bias.shape == weight.shape[:1] for _, weight, bias in matrices)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


class EncoderLayer(Layer):
    """A layer of BERT or RoBERTa.

    Args:
        matrices: q, k, v, o, up, down.
        norms: After attention, and after the MLP.
        dim: Head size.
    """

    def __init__(self, matrices: Sequence[NumberedMatrix], norms: tuple[LayerNorm, LayerNorm], dim: int) -> None:
        super().__init__(matrices, [each for norm in norms for each in (norm.weight, norm.bias)], dim)
        q, k, v, o, up, down = (weight.shape for _, weight, _ in matrices)
        assert q == k == v == o[::-1]
        assert up == down[::-1]
        assert up[1] == o[0] == q[1]
        assert all(each.numel() == self.width for norm in norms for each in (norm.weight, norm.bias))
        self.struct = _EncoderLayerStruct(*starmap(_matrix_struct, matrices), *map(_norm_struct, norms))


class DecoderLayer(Layer):
    """A layer of a gated decoder: Llama, Mistral or Qwen.

    Args:
        matrices: q, k, v, o, gate, up, down.
        norms: Weights of the RMS norms: before attention, of queries and of keys over a head (or None), before the MLP.
        eps: Of the first three norms, and of the last.
        dim: Head size.
        scaling: Of the attention scores.
        window: Sliding window; 0 for none.
    """

    def __init__(
        self,
        matrices: Sequence[NumberedMatrix],
        norms: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
        eps: tuple[float, float],
        *,
        dim: int,
        scaling: float,
        window: int = 0,
    ) -> None:
        super().__init__(matrices, norms, dim)
        q, k, v, o, gate, up, down = (weight.shape for _, weight, _ in matrices)
        assert q[1] == k[1] == gate[1] == o[0]
        assert (k, gate, q) == (v, up, o[::-1])
        assert gate == down[::-1]
        sizes = [self.width, *(None if each is None else dim for each in norms[1:3]), self.width]
        assert [None if each is None else each.numel() for each in norms] == sizes
        self.struct = _DecoderLayerStruct(
            *starmap(_matrix_struct, matrices), *map(_tensor_address, norms), dim, window, *eps, scaling
        )


def _matrix_struct(number: int, weight: Tensor, bias: Tensor | None) -> _MatrixStruct:
    d_out, d_in = weight.shape
    return _MatrixStruct(d_in, d_out, number, _tensor_address(weight), _tensor_address(bias))


def _norm_struct(norm: LayerNorm) -> _LayerNormStruct:
    return _LayerNormStruct(_tensor_address(norm.weight), _tensor_address(norm.bias), norm.eps)


def _tensor_address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _MatrixStruct(ctypes.Structure):
    """`struct matrix` of products.inc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("d_in", "d_out", "number")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
    )


class _LayerNormStruct(ctypes.Structure):
    """`struct layer_norm` of products.inc.c."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("weight", "bias")), ("eps", ctypes.c_float))


class _EncoderLayerStruct(ctypes.Structure):
    """`struct encoder_layer` of products.inc.c."""

    _fields_ = (
        *((name, _MatrixStruct) for name in ("q", "k", "v", "o", "up", "down")),
        *((name, _LayerNormStruct) for name in ("norm", "norm_after")),
    )


class _DecoderLayerStruct(ctypes.Structure):
    """`struct decoder_layer` of products.inc.c."""

    _fields_ = (
        *((name, _MatrixStruct) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm", "q_norm", "k_norm", "norm_after")),
        *((name, ctypes.c_long) for name in ("dim", "window")),
        *((name, ctypes.c_float) for name in ("eps", "eps_after", "scaling")),
    )


# --- calls ------------------------------------------------------------------------------------------------------------
# What the kernels of the loaded library take.


Argument: TypeAlias = "int | float | _Mask | None"

NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_LORA = (*(_LONG,) * 4, *(_POINTER,) * 3, ctypes.c_float, _POINTER)
_ROWS = (_LONG, _LONG)  # and their width
_DROPOUT = (_POINTER, ctypes.c_float)  # a mask, and the scale of what it keeps
DECLARED = {
    "swiglu": (_LONG, *(_POINTER,) * 3, ctypes.c_int),
    "swiglu_backward": (_LONG, *(_POINTER,) * 5, ctypes.c_int),
    "gelu": (_LONG, *(_POINTER,) * 2, ctypes.c_int),
    "gelu_backward": (_LONG, *(_POINTER,) * 3, ctypes.c_int),
    "dropout": (*_ROWS, _POINTER, _POINTER, *_DROPOUT, ctypes.c_int),
    "rms_norm": (*_ROWS, _POINTER, _POINTER, ctypes.c_float, _POINTER, _POINTER, ctypes.c_int),
    "rms_norm_backward": (*_ROWS, *(_POINTER,) * 5, ctypes.c_int),
    "added_norm": (*_ROWS, *(_POINTER,) * 4, ctypes.c_float, *_DROPOUT, *(_POINTER,) * 3, ctypes.c_int),
    "added_norm_again": (*_ROWS, *(_POINTER,) * 5, ctypes.c_int),
    "added_norm_backward": (*_ROWS, *(_POINTER,) * 4, *_DROPOUT, *(_POINTER,) * 2, ctypes.c_int),
    "rotate": (*(_LONG,) * 3, _POINTER, *(_LONG,) * 2, *(_POINTER,) * 2, ctypes.c_float, _POINTER, ctypes.c_int),
    "attention": (*(_POINTER,) * 6, ctypes.c_int),
    "attention_backward": (*(_POINTER,) * 10, ctypes.c_int),
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
    "encoder_layers": (_POINTER, _POINTER, _LONG, _LONG, *(_POINTER,) * 4, ctypes.c_int),
    "decoder_layers": (_POINTER, _LONG, _LONG, *(_POINTER,) * 4, _LONG, *(_POINTER,) * 3, ctypes.c_int),
}
RETURNED = dict.fromkeys(("encoder_layers", "decoder_layers"), _LONG)
WAKING = 1 << 20  # multiplications in 0.1 ms of one thread; a sleeping thread takes 0.05 to 2 ms to wake


def address_of(spans: AdapterSpans | None) -> int | None:
    """The address of the spans."""
    return None if spans is None else spans.address


def threads() -> int:
    """The number of threads that torch uses."""
    return torch.get_num_threads()


# --- operations -------------------------------------------------------------------------------------------------------


class CpuOps(Ops):
    """By the kernels of a loaded library, for one dtype.

    All tensors are on the CPU, of that dtype, and contiguous unless stated otherwise.
    """

    kernels = True
    layouts = frozenset({"post-norm", "pre-norm"})

    def __init__(self, loaded: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype, self._loaded = dtype, loaded
        self.tiled = dtype == torch.bfloat16 and bool(loaded.tiles())
        self.few = int(getattr(loaded, f"linear_up_to_{NAMES[dtype]}")())
        self._functions: dict[str, _NamedFuncPointer] = {}

    def call(self, name: str, *arguments: Argument | Tensor) -> None:
        """Call a kernel. A tensor is passed as its address."""
        addresses = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        self._function(name)(*addresses)

    def workspace(self, name: str, *arguments: Argument) -> int:
        """Call a kernel without a workspace: it computes nothing and returns the bytes that it needs."""
        return int(self._function(name)(*arguments))

    def _function(self, name: str) -> _NamedFuncPointer:
        function = self._functions.get(name)
        if function is None:
            function = getattr(self._loaded, f"{name}_{NAMES[self.dtype]}")
            function.argtypes, function.restype = DECLARED[name], RETURNED.get(name)
            self._functions[name] = function
        return function

    def rest(self) -> None:
        """See `end_idle_threads` below."""
        self._loaded.rest()

    # --- frozen products ----------------------------------------------------------------------------------------------

    def linear_few(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        helped: bool = True,
        spans: AdapterSpans | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x W^T + b, and (x A^T) B for each span, on at most `few` tokens; summed in float32 and rounded once.

        Args:
            x: (..., D_in)
            weight: (D_out, D_in)
            bias: (D_out,) or None.
            helped: Whether helper threads are awake; if not, a small product stays on one thread.
            spans: The adapters of the tokens.
            layer: Number of the linear layer in `spans`.

        Returns:
            (..., D_out)
        """
        d_out, d_in = weight.shape
        tokens = x.numel() // d_in
        assert x.is_contiguous()
        assert weight.is_contiguous()
        assert x.shape[-1] == d_in
        assert tokens <= self.few
        assert spans is None or (spans.tokens == tokens and layer < spans.layers)
        y = x.new_empty(*x.shape[:-1], d_out)
        count = threads() if helped or tokens * d_in * d_out > WAKING else 1
        self.call("linear", x, weight, bias, y, tokens, d_in, d_out, address_of(spans), layer, count)
        return y

    def low_rank(self, spans: AdapterSpans, layer: int, x: Tensor, y: Tensor) -> None:
        """y += (x A^T) B for each span of tokens with one adapter, summed in float32 (SGMV).

        The reference is `turret.ops.lora.sgmv`.

        Args:
            spans: Tokens and the factors of their adapters. Other tokens stay as they are.
            layer: Number of the linear layer in `spans`.
            x: (..., D_in) of N tokens.
            y: (..., D_out), changed in place.
        """
        d_in, d_out = x.shape[-1], y.shape[-1]
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert layer < spans.layers
        assert x.numel() == spans.tokens * d_in
        assert y.numel() == spans.tokens * d_out
        self.call("low_rank", spans.address, layer, x, y, d_in, d_out, threads())

    def layer_weights(
        self,
        matrices: Sequence[NumberedMatrix],
        norms: tuple[LayerNorm, LayerNorm] | tuple[RMSNorm, RMSNorm],
        head_norms: tuple[RMSNorm, RMSNorm] | None,
        *,
        dim: int,
        scaling: float,
        window: int,
    ) -> LayerWeights | None:
        heads, (first, last) = head_norms or (), norms
        biases = [each.bias for each in norms if isinstance(each, LayerNorm)]
        own = [*biases, *(each.weight for each in (*norms, *heads))]
        tensors = [*own, *(each for _, W, b in matrices for each in (W, b) if each is not None)]
        if not all(each.dtype == self.dtype and each.is_contiguous() and each.is_cpu for each in tensors):
            return None
        if isinstance(first, LayerNorm) and isinstance(last, LayerNorm):
            return EncoderLayer(matrices, (first, last), dim)
        if any(each.eps != first.eps for each in heads):
            return None
        q, k = (each.weight for each in heads) if heads else (None, None)
        weights = first.weight, q, k, last.weight
        return DecoderLayer(matrices, weights, (first.eps, last.eps), dim=dim, scaling=scaling, window=window)

    def whole_layers(self, layers: Sequence[LayerWeights]) -> Layers:
        return Layers(self, [cast("Layer", each) for each in layers])

    def lay_out(self, factors: Sequence[tuple[Tensor, Tensor]], scaling: float, flat: Tensor) -> None:
        """The kernel takes factors in float32, contiguous."""
        parts = [each for pair in factors for each in pair]
        if not all(each.dtype == torch.float32 and each.is_contiguous() and each.is_cpu for each in parts):
            super().lay_out(factors, scaling, flat)
            return
        rank = len(factors[0][0])
        assert all(len(A) == B.shape[1] == rank for A, B in factors)
        assert flat.is_contiguous()
        assert flat.numel() == sum(each.numel() for each in parts)
        addresses = torch.tensor([(A.data_ptr(), B.data_ptr()) for A, B in factors])
        sizes = torch.tensor([(A.shape[1], len(B)) for A, B in factors])
        self.call("lay_out", addresses, sizes, len(factors), rank, scaling, flat)

    # --- LoRA ---------------------------------------------------------------------------------------------------------

    def takes_lora(self, loras: Loras) -> bool:
        """Widths that are multiples of 32; factors in float32, contiguous."""
        factors = [each for lora in loras if lora is not None for each in (lora.A.mT, lora.B)]
        plain = all(each.dtype == torch.float32 and len(each) % 32 == 0 for each in factors)
        return plain and all(lora is None or (lora.A.is_contiguous() and lora.B.is_contiguous()) for lora in loras)

    def _add_one_lora(self, y: Tensor, x: Tensor, lora: Lora) -> Tensor:
        """Multiplied and added up in float32; h is in float32."""
        transposed, h = torch.empty_like(lora.B), torch.empty(len(x), len(lora.A))
        self.call("lora", *_lora(x, lora), _mask(lora.dropped, x), transposed, h, y, threads())
        return h

    def _one_lora_backward(
        self, lora: Lora, x: Tensor, h: Tensor, dy: Tensor, dx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dA, dB, transposed, dh = (torch.empty_like(each) for each in (lora.A, lora.B, lora.B, h))
        arguments = *_lora(x, lora), _mask(lora.dropped, x)
        self.call("lora_backward", *arguments, transposed, dh, h, dy, dx, dA, dB, threads())
        return dA, dB

    # --- norms, activations, positions --------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        y, r = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        self.call("rms_norm", r.numel(), x.shape[-1], x, norm.weight, norm.eps, y, r, threads())
        return y, r

    def rms_norm_backward(
        self, x: Tensor, norm: RMSNorm, r: Tensor | None, dy: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        assert r is not None
        dx = torch.empty_like(x)
        self.call("rms_norm_backward", r.numel(), x.shape[-1], x, norm.weight, r, dy, dx, threads())
        return dx if plus is None else dx.add_(plus)

    def added_norm(self, a: Tensor, x: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
        """The third result is (..., 2) float32, mean and 1 / deviation of each row."""
        s, y, stats = torch.empty_like(a), torch.empty_like(a), torch.empty(*a.shape[:-1], 2, dtype=torch.float32)
        inputs = stats.numel() // 2, a.shape[-1], a, x, norm.weight, norm.bias, norm.eps
        self.call("added_norm", *inputs, _mask(norm.dropped, a), norm.dropped.scale, s, y, stats, threads())
        return y, s, stats

    def added_norm_again(self, s: Tensor, norm: LayerNorm, stats: Tensor) -> Tensor:
        """Bit-equal to the first time."""
        y, rows = torch.empty_like(s), stats.numel() // 2
        self.call("added_norm_again", rows, s.shape[-1], s, norm.weight, norm.bias, stats, y, threads())
        return y

    def added_norm_backward(self, s: Tensor, norm: LayerNorm, stats: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        da, dx = torch.empty_like(s), torch.empty_like(s)
        inputs = stats.numel() // 2, s.shape[-1], s, norm.weight, stats, dy
        self.call("added_norm_backward", *inputs, _mask(norm.dropped, s), norm.dropped.scale, da, dx, threads())
        return da, dx

    def dropout(self, x: Tensor, dropped: DropoutArguments, scale: float) -> Tensor:
        y, width = torch.empty_like(x), x.shape[-1]
        self.call("dropout", x.numel() // width, width, x, y, _mask(dropped, x), scale, threads())
        return y

    def gelu(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        self.call("gelu", x.numel(), x, y, threads())
        return y

    def gelu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        dx = torch.empty_like(x)
        self.call("gelu_backward", x.numel(), x, dy, dx, threads())
        return dx

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty_like(gate)
        self.call("swiglu", gate.numel(), gate, up, y, threads())
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self.call("swiglu_backward", gate.numel(), gate, up, dy, dgate, dup, threads())
        return dgate, dup

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """Of q and k the last axis is contiguous; the results are."""
        found = []
        for x in (q, k):
            y = x.new_empty(x.shape)
            self.call("rotate", *x.shape, x, *x.stride()[:2], cos, sin, sign, y, threads())
            found.append(y)
        return found[0], found[1]

    # --- attention ----------------------------------------------------------------------------------------------------

    def takes_attention(self, rows: AttentionRows, prefixes: Prefixes, dim: int, p: float) -> bool:
        return self.attends

    def attention(
        self, rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor]:
        y, log_sum = q.new_empty(q.shape), torch.empty(q.shape[:2], dtype=torch.float32)
        struct = rows_struct(rows, q, k, v, prefixes, dropped)
        self.call("attention", ctypes.addressof(struct), q, k, v, y, log_sum, threads())
        return y, log_sum

    def attention_backward(
        self,
        rows: AttentionRows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefixes: Prefixes,
        dropped: DropoutArguments,
        y: Tensor | None,
        log_sum: Tensor,
        dy: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Scores are computed again, some queries at a time, while they are in a core's cache (Dao et al. 2022)."""
        dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype) for each in (q, k, v))
        if not rows.all_asked:
            dq.zero_()
        struct = rows_struct(rows, q, k, v, prefixes, dropped)
        of_rows = torch.zeros(len(rows.query_starts), 2, k.shape[1], struct.most_prefix, q.shape[2])
        tensors = q, k, v, dy, log_sum, dq, dk, dv, of_rows
        self.call("attention_backward", ctypes.addressof(struct), *tensors, threads())
        return dq, dk, dv, list(_of_prefixes(of_rows, prefixes))

    def kv_step(self, lengths: Tensor, prefixes: Tensor, like: Tensor) -> KVStep | None:
        return CpuKVStep(self, lengths, prefixes, like) if is_enabled("cached_attention") else None


def _lora(x: Tensor, lora: Lora) -> tuple[int | float, ...]:
    """(tokens, D_in, D_out, R, x, A, B, scale). x: (tokens, D_in)."""
    A, B = lora.A, lora.B
    (rank, d_in), (d_out, ranks), (tokens, own) = A.shape, B.shape, x.shape
    assert (ranks, own) == (rank, d_in)
    assert d_in % 32 == d_out % 32 == 0
    assert x.is_contiguous()
    assert A.is_contiguous()
    assert B.is_contiguous()
    assert A.dtype == B.dtype == torch.float32
    return tokens, d_in, d_out, rank, x.data_ptr(), A.data_ptr(), B.data_ptr(), lora.scale


def _of_prefixes(of_rows: Tensor, prefixes: Prefixes) -> Iterator[Tensor]:
    """The gradient of each prefix, summed over its rows. of_rows: (B, 2, H_kv, P, D) with P of the longest prefix."""
    for number, pair in enumerate(prefixes.pairs):
        rows = [row for row, own in enumerate(prefixes.of_row) if own == number]
        for side, each in enumerate(pair):
            total = torch.zeros(each.shape)
            for row in rows:
                total += of_rows[row, side, :, : each.shape[1]]
            yield total.to(each.dtype)


class CpuKVStep:
    """See `core.KVStep`.

    Args:
        ops: Of the cache's dtype.
        lengths: (B,) int64 on the CPU, including the newest token.
        prefixes: (B,) int64 on the CPU, tokens of each prefix.
        like: (B, H_kv, S, D), a layer's keys or values. All layers have its strides; S and D are contiguous.
    """

    def __init__(self, ops: CpuOps, lengths: Tensor, prefixes: Tensor, like: Tensor) -> None:
        rows, kv_heads, longest, dim = like.shape
        assert like.stride()[2:] == (dim, 1)
        assert len(lengths) == len(prefixes) == rows
        most = int(lengths.max())
        assert most <= longest
        self.shape, self.strides = (rows, kv_heads, dim), like.stride()
        self._ops, self._lengths = ops, (lengths, prefixes)
        addresses = (each.data_ptr() for each in self._lengths)
        self._struct = _CachedStruct(rows, kv_heads, dim, *like.stride()[:2], most, *addresses)
        self.address = ctypes.addressof(self._struct)

    def require(self, *tensors: Tensor) -> None:
        """Check that tensors have the shape and strides of `like`."""
        for each in tensors:
            assert (*each.shape[:2], each.shape[3]) == self.shape
            assert each.stride() == self.strides

    def keep(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> bool:
        strides, dtype = new_keys.stride(), self._ops.dtype
        if strides != new_values.stride() or strides[-1] != 1 or not new_keys.dtype == new_values.dtype == dtype:
            return False
        self.require(keys, values)
        assert new_keys.shape == new_values.shape == self.shape
        self._ops.call("keep_step", self.address, new_keys, new_values, *strides[:2], keys, values)
        return True

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int) -> Tensor | None:
        """window: 0 for none; else a key further back is seen only if it belongs to the prefix."""
        if q.stride(-1) != 1 or q.dtype != self._ops.dtype:
            return None
        self.require(keys, values)
        rows, heads, dim = q.shape
        assert (rows, dim) == (self.shape[0], self.shape[2])
        assert heads % self.shape[1] == 0
        y, strides = q.new_empty(q.shape), q.stride()[:2]
        self._ops.call("attend_step", self.address, q, *strides, heads, keys, values, scaling, window, y, threads())
        return y


class Layers:
    """See `core.WholeLayers`: consecutive layers of equal shape, on at most `few` tokens."""

    def __init__(self, ops: CpuOps, layers: Sequence[Layer]) -> None:
        self._ops, self._layers, alike = ops, tuple(layers), layers[0].alike
        self.kind, self.dtype, self.width, self.heads, self.kv_heads, self.dim = alike
        assert self.dtype == ops.dtype
        assert all(each.alike == alike for each in layers)
        self._workspaces: dict[int, int] = {}  # bytes of the workspace, by number of tokens
        self._addresses = (ctypes.c_void_p * len(layers))(*(each.address for each in layers))
        self._address = ctypes.addressof(self._addresses)

    def __len__(self) -> int:
        return len(self._layers)

    def encoder(self, x: Tensor, spans: AdapterSpans | None, rows: Sequence[tuple[AttentionRows, Prefixes]]) -> Tensor:
        """Without dropout."""
        tokens, count = self._tokens(EncoderLayer, x, spans), len(self)
        assert len(rows) == count
        assert all(each.all_asked for each, _ in rows)
        qkv = torch.empty(tokens, self.heads, self.dim, dtype=x.dtype, device="meta")  # their shape and strides
        structs = [rows_struct(each, qkv, qkv, qkv, prefixes, NO_DROPOUT) for each, prefixes in rows]
        pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(each) for each in structs))
        y = torch.empty_like(x)
        places = ctypes.addressof(pointers), count, tokens, x.data_ptr(), address_of(spans), y.data_ptr()
        self._call("encoder_layers", tokens, (self._address, *places))
        return y

    def decoder(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        spans: AdapterSpans | None,
        parts: Sequence[Sequence[tuple[KVStep, Tensor, Tensor]]],
    ) -> Tensor:
        tokens = self._tokens(DecoderLayer, x, spans)
        for each in (cos, sin):
            assert each.is_contiguous()
            assert each.dtype == x.dtype
            assert each.numel() == tokens * self.dim
        assert len(parts) == len(self)
        own = [[(kept, k, v) for kept, k, v in layer if isinstance(kept, CpuKVStep)] for layer in parts]
        count = len(own[0])
        for layer in own:
            assert len(layer) == count
            assert sum(kept.shape[0] for kept, _, _ in layer) == tokens
            for kept, keys, values in layer:
                kept.require(keys, values)
                assert keys.dtype == values.dtype == x.dtype
                assert kept.shape[1:] == (self.kv_heads, self.dim)
        structs = (PartStruct * (len(own) * count))(
            *(PartStruct(kept.address, k.data_ptr(), v.data_ptr()) for layer in own for kept, k, v in layer)
        )
        y = torch.empty_like(x)
        places = (
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            address_of(spans),
            count,
            ctypes.addressof(structs),
            y.data_ptr(),
        )
        self._call("decoder_layers", tokens, (self._address, len(own), tokens, *places))
        return y

    def _tokens(self, kind: type[Layer], x: Tensor, spans: AdapterSpans | None) -> int:
        assert self.kind is kind
        tokens = x.numel() // self.width
        assert x.is_contiguous()
        assert x.shape[-1] == self.width
        assert x.dtype == self.dtype
        assert 0 < tokens <= self._ops.few
        assert spans is None or spans.tokens == tokens
        return tokens

    def _call(self, name: str, tokens: int, arguments: tuple[int | None, ...]) -> None:
        """Call a kernel with the workspace that it needs for that many tokens."""
        count = threads()
        if tokens not in self._workspaces:
            self._workspaces[tokens] = self._ops.workspace(name, *arguments, None, count)
        workspace = torch.empty(self._workspaces[tokens], dtype=torch.uint8)
        self._ops.call(name, *arguments, workspace, count)


# --- check ------------------------------------------------------------------------------------------------------------
# Compare every kernel with torch when the library is loaded. A wrong kernel costs speed, not correctness.
#
# Layers in one call consist of the kernels that are checked here; tests compare them bit by bit.


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative to the largest element
SIZES = ((64, 96), (37, 41))  # D_in and D_out, for tiles and odd ones


def require_close(every: Iterable[CpuOps]) -> None:
    """Raises NotBuilt with the name of the first kernel whose result differs from torch's."""
    for ops in every:
        with torch.inference_mode(False), torch.enable_grad():  # the caller may have set the opposite
            results = _results(ops)
        for name, (given, expected) in results.items():
            off = (given.double() - expected.double()).abs().max() / expected.double().abs().max()
            if not bool(off <= TOLERANCES[ops.dtype]):
                raise NotBuilt(f"kernel {name} in {ops.dtype} is off by {float(off):.1e}")


def _results(ops: CpuOps) -> dict[str, tuple[Tensor, Tensor]]:
    """What the kernels compute, and torch in float64: its products of float32 may be rounded to bfloat16."""
    draw = seeded_randn(ops.dtype, ops.dtype)
    given, expected = _computed(ops, draw), _computed(REFERENCE, seeded_randn(ops.dtype, torch.float64))
    results = {name: (each, expected[name]) for name, each in given.items()}
    return results | _checked_low_rank(ops, draw) | _checked_attention(ops, draw) | _checked_step(ops, draw)


def _computed(ops: Ops, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The results of operations that `REFERENCE` has too. Five tokens and rank 13 use every block size of LoRA."""
    gate, up, dy = draw(3, 37), draw(3, 37), draw(3, 37)
    norm, centred = RMSNorm(draw(37), 1e-5), LayerNorm(draw(37), draw(37), 1e-5)
    dgate, dup = ops.swiglu_backward(gate, up, dy)
    normed, r = ops.rms_norm(gate, norm)
    y, s, stats = ops.added_norm(gate, up, centred)
    da, dx = ops.added_norm_backward(s, centred, stats, dy)
    x, cos, sin = draw(5, 2, 8), draw(5, 8), draw(5, 8)
    dropped = DropoutArguments.of(0.25, 12345, torch.arange(400))
    found = {
        "swiglu": ops.swiglu(gate, up),
        "swiglu_backward": dgate,
        "swiglu_backward (up)": dup,
        "gelu": ops.gelu(gate),
        "gelu_backward": ops.gelu_backward(gate, dy),
        "rms_norm": normed,
        "rms_norm_backward": ops.rms_norm_backward(gate, norm, r, dy),
        "added_norm": y,
        "added_norm_again": ops.added_norm_again(s, centred, stats),
        "added_norm_backward": dx,
        "added_norm_backward (branch)": da,
        "rotate": ops.rotate(x, x, cos, sin, 1.0)[0],
        "dropout": ops.dropout(draw(400, 100), dropped, dropped.scale),
    }
    x, y, dy, dx = draw(5, 64), draw(5, 32), draw(5, 32), draw(5, 64)
    lora = Lora(draw(13, 64).float(), draw(32, 13).float(), 0.5)
    h = ops._add_one_lora(y, x, lora)
    dA, dB = ops._one_lora_backward(lora, x, h, dy, dx)
    found |= {"lora": y, "lora dx": dx, "lora dA": dA, "lora dB": dB}
    for d_in, d_out in SIZES:
        A, B, run = draw(3, d_in).float(), draw(d_out, 3).float(), draw(2 * 3 * (d_in + d_out))
        ops.lay_out([(A, B), (A, B)], 2.0, run)
        found[f"lay_out {d_in}"] = run
    return found


def _checked_low_rank(ops: CpuOps, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Spans of 40, 5 and 0 tokens, ranks 3 and 17, tokens without an adapter."""
    results = {}
    for d_in, d_out in SIZES:
        x, y = draw(49, d_in), draw(49, d_out)
        factors = [(draw(3, d_in), draw(3, d_out)), (draw(17, d_in) / 2, draw(17, d_out) / 2)]
        wide = y.double()
        for (start, end), (A, B) in zip(((1, 41), (43, 48)), factors, strict=True):
            wide[start:end] += x[start:end].double() @ A.double().mT @ B.double()
        addresses = torch.tensor([[[0, 0], [A.data_ptr(), B.data_ptr()]] for A, B in (*factors, factors[1])])
        spans = AdapterSpans(
            torch.tensor([1, 43, 48]), torch.tensor([41, 48, 48]), torch.tensor([3, 17, 17]), addresses, len(x)
        )
        ops.low_rank(spans, 1, x, y)
        results[f"low_rank {d_in}"] = (y, wide)
    return results


def _checked_attention(ops: CpuOps, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Two causal rows of 40 and 3 tokens, grouped heads, a prefix of 2 tokens for the second row."""
    q, k, v, dy = draw(43, 4, 24), draw(43, 2, 24), draw(43, 2, 24), draw(43, 4, 24)
    prefix = draw(2, 2, 24), draw(2, 2, 24)
    starts, lengths = torch.tensor([0, 40]), torch.tensor([40, 3])
    rows = AttentionRows(starts, lengths, starts, lengths, scaling=0.3, causal=True)
    prefixes = Prefixes([prefix], [None, 0])
    y, log_sum = ops.attention(rows, q, k, v, prefixes, NO_DROPOUT)
    dq, dk, dv, dprefix = ops.attention_backward(rows, q, k, v, prefixes, NO_DROPOUT, y, log_sum, dy)
    wide = [each.double().requires_grad_() for each in (q, k, v, *prefix)]
    keys, values = (
        torch.cat([each[:40], pre.transpose(0, 1), each[40:]]) for each, pre in zip(wide[1:3], wide[3:], strict=True)
    )
    longer = AttentionRows(starts, lengths, starts, torch.tensor([40, 5]), scaling=0.3, causal=True)
    whole = attention_by_rows(longer, wide[0], keys, values)
    names = ("dq", "dk", "dv", "prefix 0", "prefix 1")
    pairs = zip((dq, dk, dv, *dprefix), torch.autograd.grad(whole, wide, dy.double()), strict=True)
    results = {f"attention {name}": pair for name, pair in zip(names, pairs, strict=True)}
    return {"attention": (y, whole.detach())} | results


def _checked_step(ops: CpuOps, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A product of up to 5 tokens; three rows of 20, 1 and 7 keys, grouped heads, a prefix of 2 for the last row."""
    results = {}
    x, weight, bias = draw(5, 37), draw(19, 37), draw(19)
    x = x[: ops.few]
    if len(x):
        y, (A, B) = x.double() @ weight.double().mT + bias.double(), (draw(3, 37), draw(3, 19))
        results["linear"] = (ops.linear_few(x, weight, bias), y)
        addresses = torch.tensor([[[A.data_ptr(), B.data_ptr()]]])
        spans = AdapterSpans(torch.tensor([1]), torch.tensor([len(x) - 1]), torch.tensor([3]), addresses, len(x))
        y = y.clone()
        y[1:-1] += x[1:-1].double() @ A.double().mT @ B.double()
        results["linear and its adapters"] = (ops.linear_few(x, weight, bias, spans=spans), y)
    keys, values, new_keys, new_values, q = (
        draw(3, 2, 24, 40),
        draw(3, 2, 24, 40),
        draw(3, 2, 40),
        draw(3, 2, 40),
        draw(3, 4, 40),
    )
    lengths, prefixes = torch.tensor([20, 1, 7]), torch.tensor([0, 0, 2])
    step = CpuKVStep(ops, lengths, prefixes, keys)
    step.keep(keys, values, new_keys, new_values)
    newest = [each[torch.arange(3), :, lengths - 1] for each in (keys, values)]
    results |= {"keep_step keys": (newest[0], new_keys), "keep_step values": (newest[1], new_values)}
    column = torch.arange(24)[None]
    hidden = (column >= lengths[:, None]) | ((lengths[:, None] - 1 - column >= 4) & (column >= prefixes[:, None]))
    wide = [each.double().repeat_interleave(2, 1) for each in (keys, values)]  # (3, 4, 24, 40)
    scores = 0.3 * torch.einsum("bhd,bhsd->bhs", q.double(), wide[0])
    y = torch.einsum("bhs,bhsd->bhd", scores.masked_fill(hidden[:, None], -1e30).softmax(-1), wide[1])
    attended = step.attend(q, keys, values, 0.3, window=4)
    assert attended is not None
    results["attend_step"] = (attended, y)
    return results


# --- the library of this process --------------------------------------------------------------------------------------
# Loaded or compiled, and checked against torch.


@functools.cache
def _load_library() -> tuple[dict[torch.dtype, CpuOps], str]:
    try:
        loaded, origin = load()
        every = {dtype: CpuOps(loaded, dtype) for dtype in TOLERANCES}
        # The pass that asked first may be one of `checkpoint`, which counts what is saved.
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            require_close(every.values())
    except (NotBuilt, AttributeError) as error:  # AttributeError: the library lacks a kernel
        return {}, str(error)
    return every, origin


def library(dtype: torch.dtype = torch.float32) -> CpuOps | None:
    """The operations by the kernels, which are compiled if needed and checked at the first call; None without them."""
    return _load_library()[0].get(dtype) if is_enabled("kernels") else None


def kernel_status() -> str:
    """Where the kernels come from, or why there are none; for messages."""
    return _load_library()[1]


def end_idle_threads() -> None:
    """End the idle OpenMP helper threads of the calling thread.

    If several threads of a process have helpers, GNU's OpenMP puts all of them to sleep between two operations, and a
    pass over 16 tokens takes up to 2x longer (two cores). The next parallel region creates new helpers.
    """
    for ops in _load_library()[0].values():
        ops.rest()
