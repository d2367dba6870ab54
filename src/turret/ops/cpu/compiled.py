"""The kernels as functions of tensors; shapes and strides are checked here. `library()` has those of this process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from turret.ops.cpu.build import NotBuilt, load
from turret.ops.structs import NO_DROPOUT, AdapterSpans, AttentionRows, DropoutArguments, LayerNorm, Prefixes

if TYPE_CHECKING:
    from ctypes import _NamedFuncPointer


# --- arguments --------------------------------------------------------------------------------------------------------
# Arguments of the kernels besides tensors, as C structs: rows, prefixes, adapter spans, KV cache, dropout.
#
# Each is made once a pass. Axes: B rows, N tokens of all rows, H heads, P prefix, D head size, S spans.


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


def _without_prefixes(rows: AttentionRows) -> tuple[int, Tensor]:
    """The most keys of a row, and the length of each row's prefix, all 0: the same for every layer of a pass."""
    known: tuple[int, Tensor] | None = rows.memo.get("without prefixes")
    if known is None:
        known = int(rows.key_lengths.max()), torch.zeros(len(rows.key_lengths), dtype=torch.int64)
        rows.memo["without prefixes"] = known
    return known


# --- calls ------------------------------------------------------------------------------------------------------------
# Call a kernel of the loaded library: argument types, and the addresses of tensors.


Argument: TypeAlias = "int | float | ctypes.c_void_p | ctypes.c_long | ctypes.c_int | ctypes.c_float | _Mask | None"

NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_LORA = (*(_LONG,) * 4, *(_POINTER,) * 3, ctypes.c_float, _POINTER)
_ROWS = (_LONG, _LONG)  # and their width
DECLARED = {  # declared arguments may be plain Python numbers, and tensors
    "swiglu": (_LONG, *(_POINTER,) * 3, ctypes.c_int),
    "swiglu_backward": (_LONG, *(_POINTER,) * 5, ctypes.c_int),
    "gelu": (_LONG, *(_POINTER,) * 2, ctypes.c_int),
    "gelu_backward": (_LONG, *(_POINTER,) * 3, ctypes.c_int),
    "rms_norm": (*_ROWS, _POINTER, _POINTER, ctypes.c_float, _POINTER, _POINTER, ctypes.c_int),
    "rms_norm_backward": (*_ROWS, *(_POINTER,) * 5, ctypes.c_int),
    "added_norm_again": (*_ROWS, *(_POINTER,) * 5, ctypes.c_int),
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


class Calls:
    """The loaded library. All tensors are on the CPU, of one dtype, and contiguous unless stated otherwise."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded
        self._tiles = bool(loaded.tiles())
        self._functions: dict[tuple[str, torch.dtype], _NamedFuncPointer] = {}
        self._few = {dtype: int(getattr(loaded, f"linear_up_to_{name}")()) for dtype, name in NAMES.items()}

    def tiled(self, dtype: torch.dtype) -> bool:
        """Whether products use the processor's matrix tiles (AMX), which are about 8x faster."""
        return self._tiles and dtype == torch.bfloat16

    def _call(self, name: str, dtype: torch.dtype, *arguments: Argument | Tensor) -> None:
        """Call a kernel. A tensor is passed as its address."""
        addresses = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        self._function(name, dtype)(*addresses)

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
# The small operations between matrix products, each in one pass over memory (operations.inc.c).


class Operations(Calls):
    """Activations, dropout, norms and rotary positions, with their gradients."""

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        y = torch.empty_like(gate)
        self._call("swiglu", gate.dtype, gate.numel(), gate, up, y, threads())
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(dgate, dup)."""
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self._call("swiglu_backward", gate.dtype, gate.numel(), gate, up, dy, dgate, dup, threads())
        return dgate, dup

    def gelu(self, x: Tensor) -> Tensor:
        """x Phi(x), where Phi is the cumulative normal distribution."""
        y = torch.empty_like(x)
        self._call("gelu", x.dtype, x.numel(), x, y, threads())
        return y

    def gelu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """dx."""
        dx = torch.empty_like(x)
        self._call("gelu_backward", x.dtype, x.numel(), x, dy, dx, threads())
        return dx

    def dropout(self, x: Tensor, dropped: DropoutArguments, scale: float | None = None) -> Tensor:
        """Kept elements times `scale` (default: 1 / (1 - p)), zero elsewhere."""
        y, width = torch.empty_like(x), x.shape[-1]
        by = ctypes.c_float(dropped.scale if scale is None else scale)
        sizes = map(ctypes.c_long, (x.numel() // width, width))
        self._call("dropout", x.dtype, *sizes, p(x), p(y), _mask(dropped, x), by, threads())
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(weight * x r, r), r = 1 / sqrt(mean(x^2) + eps). x: (..., D), r: (...) float32."""
        y, r = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        self._call("rms_norm", x.dtype, r.numel(), x.shape[-1], x, weight, eps, y, r, threads())
        return y, r

    def rms_norm_backward(self, x: Tensor, weight: Tensor, r: Tensor, dy: Tensor) -> Tensor:
        """dx."""
        dx = torch.empty_like(x)
        self._call("rms_norm_backward", x.dtype, r.numel(), x.shape[-1], x, weight, r, dy, dx, threads())
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
            _mask(dropped, a),
            ctypes.c_float(dropped.scale),
            *map(p, (s, y, stats)),
            threads(),
        )
        return y, s, stats

    def added_norm_again(self, s: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> Tensor:
        """LayerNorm(s) again, bit-equal to the result of `added_norm`, from its s and stats."""
        y = torch.empty_like(s)
        self._call("added_norm_again", s.dtype, stats.numel() // 2, s.shape[-1], s, weight, bias, stats, y, threads())
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
            _mask(dropped, s),
            ctypes.c_float(dropped.scale),
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
        self._call("rotate", x.dtype, tokens, heads, dim, x, *x.stride()[:2], cos, sin, sign, y, threads())
        return y


# --- layers -----------------------------------------------------------------------------------------------------------
# The frozen weights of whole layers, for the kernels that compute several layers in one call.
#
# They are made once, checked here, and keep their tensors alive, so a call checks only its inputs.


@dataclass(frozen=True)
class LayerMatrix:
    """A frozen linear layer: weight (D_out, D_in), bias (D_out,) or none, and its number in `AdapterSpans`."""

    number: int
    weight: Tensor
    bias: Tensor | None

    @property
    def struct(self) -> _MatrixStruct:
        d_out, d_in = self.weight.shape
        return _MatrixStruct(d_in, d_out, self.number, _tensor_address(self.weight), _tensor_address(self.bias))


class Layer:
    """A layer with weights of one dtype, all contiguous.

    Args:
        matrices: Linear layers; queries and keys come first.
        others: Other tensors.
        dim: Head size.
    """

    struct: ctypes.Structure

    def __init__(self, matrices: Sequence[LayerMatrix], others: Sequence[Tensor | None], dim: int) -> None:
        tensors = [*others, *(each for matrix in matrices for each in (matrix.weight, matrix.bias))]
        self._tensors = [each for each in tensors if each is not None]  # C reads their memory
        query, key = (each.weight.shape for each in matrices[:2])
        self.dtype, self.width, self.dim = matrices[0].weight.dtype, query[1], dim
        self.heads, self.kv_heads = query[0] // dim, key[0] // dim
        # equal for all layers of one call; cached, because every layer compares it in every pass
        self.alike = type(self), self.dtype, self.width, self.heads, self.kv_heads, self.dim
        assert query[0] % dim == key[0] % dim == 0
        assert all(each.dtype == self.dtype and each.is_contiguous() and each.is_cpu for each in self._tensors)
        assert all(m.bias is None or m.bias.shape == m.weight.shape[:1] for m in matrices)

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

    def __init__(self, matrices: Sequence[LayerMatrix], norms: tuple[LayerNorm, LayerNorm], dim: int) -> None:
        super().__init__(matrices, [each for norm in norms for each in (norm.weight, norm.bias)], dim)
        q, k, v, o, up, down = (each.weight.shape for each in matrices)
        assert q == k == v == o[::-1]
        assert up == down[::-1]
        assert up[1] == o[0] == q[1]
        assert all(each.numel() == self.width for norm in norms for each in (norm.weight, norm.bias))
        self.struct = _EncoderLayerStruct(*(each.struct for each in matrices), *map(_norm_struct, norms))


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
        matrices: Sequence[LayerMatrix],
        norms: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
        eps: tuple[float, float],
        *,
        dim: int,
        scaling: float,
        window: int = 0,
    ) -> None:
        super().__init__(matrices, norms, dim)
        q, k, v, o, gate, up, down = (each.weight.shape for each in matrices)
        assert q[1] == k[1] == gate[1] == o[0]
        assert (k, gate, q) == (v, up, o[::-1])
        assert gate == down[::-1]
        sizes = [self.width, *(None if each is None else dim for each in norms[1:3]), self.width]
        assert [None if each is None else each.numel() for each in norms] == sizes
        self.struct = _DecoderLayerStruct(
            *(each.struct for each in matrices), *map(_tensor_address, norms), dim, window, *eps, scaling
        )


class Layers:
    """Consecutive layers of equal shape."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers, alike = tuple(layers), layers[0].alike
        self.kind, self.dtype, self.width, self.heads, self.kv_heads, self.dim = alike
        assert all(each.alike == alike for each in layers)
        self.workspaces: dict[int, int] = {}  # bytes of the workspace, by number of tokens
        self._addresses = (ctypes.c_void_p * len(layers))(*(each.address for each in layers))

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._addresses)


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


# --- products ---------------------------------------------------------------------------------------------------------
# Matrix products: LoRA in training, many LoRAs in one batch, frozen layers on few tokens.


WAKING = 1 << 20  # multiplications in 0.1 ms of one thread; a sleeping thread takes 0.05 to 2 ms to wake


class Products(Calls):
    """Axes: N tokens, R rank, S spans."""

    def lora(self, x: Tensor, A: Tensor, B: Tensor, by: float, dropped: DropoutArguments, y: Tensor) -> Tensor:
        """y += by (dropout(x) A^T) B^T, where dropout does not scale.

        Args:
            x: (N, D_in); D_in is a multiple of 32.
            A: (R, D_in) float32.
            B: (D_out, R) float32.
            by: Scaling, with the 1 / (1 - p) of dropout.
            dropped: Dropout of x.
            y: (N, D_out) of x's dtype, changed in place; D_out is a multiple of 32.

        Returns:
            h = dropout(x) A^T, (N, R) float32, for the backward pass.
        """
        transposed, h = torch.empty_like(B), torch.empty(x.shape[0], A.shape[0])
        arguments = *_lora(x, A, B), by, _mask(dropped, x)
        self._call("lora", x.dtype, *arguments, *map(p, (transposed, h, y)), threads())
        return h

    def lora_backward(
        self,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        by: float,
        dropped: DropoutArguments,
        h: Tensor,
        dy: Tensor,
        dx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(dA, dB) of `lora`. dx, if given, holds dy W and gets the gradient through the factors added."""
        dA, dB, transposed, dh = (torch.empty_like(each) for each in (A, B, B, h))
        arguments = *_lora(x, A, B), by, _mask(dropped, x)
        self._call("lora_backward", x.dtype, *arguments, *map(p, (transposed, dh, h, dy, dx, dA, dB)), threads())
        return dA, dB

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
        self._call("low_rank", x.dtype, spans.address, layer, x, y, d_in, d_out, threads())

    def lay_out(self, factors: Sequence[tuple[Tensor, Tensor]], by: float, run: Tensor) -> None:
        """Copy A and by B^T of each layer into one buffer, one after another, rounded to its dtype.

        Args:
            factors: A (R, D_in) and B (D_out, R) of each layer, float32, of one R.
            by: Scaling.
            run: (sum of R (D_in + D_out)), filled.
        """
        rank = len(factors[0][0])
        for A, B in factors:
            assert A.dtype == B.dtype == torch.float32
            assert A.is_contiguous()
            assert B.is_contiguous()
            assert len(A) == B.shape[1] == rank
        assert run.is_contiguous()
        assert run.numel() == sum(A.numel() + B.numel() for A, B in factors)
        addresses = torch.tensor([(A.data_ptr(), B.data_ptr()) for A, B in factors])
        sizes = torch.tensor([(A.shape[1], len(B)) for A, B in factors])
        self._call("lay_out", run.dtype, addresses, sizes, len(factors), rank, by, run)

    def few(self, dtype: torch.dtype) -> int:
        """The most tokens for `linear`; 0 if torch's own product is as fast for any number."""
        return self._few[dtype]

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spans: AdapterSpans | None = None,
        layer: int = 0,
        *,
        helped: bool = True,
    ) -> Tensor:
        """x W^T + b, and (x A^T) B for each span, on at most `few` tokens; summed in float32 and rounded once.

        Args:
            x: (..., D_in)
            weight: (D_out, D_in)
            bias: (D_out,) or None.
            spans: The adapters of the tokens.
            layer: Number of the linear layer in `spans`.
            helped: Whether helper threads are awake; if not, a small product stays on one thread.

        Returns:
            (..., D_out)
        """
        d_out, d_in = weight.shape
        tokens = x.numel() // d_in
        assert x.is_contiguous()
        assert weight.is_contiguous()
        assert x.shape[-1] == d_in
        assert tokens <= self._few[x.dtype]
        assert spans is None or (spans.tokens == tokens and layer < spans.layers)
        y = x.new_empty(*x.shape[:-1], d_out)
        count = torch.get_num_threads() if helped or tokens * d_in * d_out > WAKING else 1
        self._call("linear", x.dtype, x, weight, bias, y, tokens, d_in, d_out, at(spans), layer, count)
        return y


def _lora(x: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """(tokens, D_in, D_out, R, x, A, B)."""
    (rank, d_in), (d_out, ranks), (tokens, own) = A.shape, B.shape, x.shape
    assert (ranks, own) == (rank, d_in)
    assert d_in % 32 == d_out % 32 == 0
    assert x.is_contiguous()
    assert A.is_contiguous()
    assert B.is_contiguous()
    assert A.dtype == B.dtype == torch.float32
    return tokens, d_in, d_out, rank, x.data_ptr(), A.data_ptr(), B.data_ptr()


# --- attention --------------------------------------------------------------------------------------------------------
# Attention over unpadded rows, and of one query per row over a KV cache (attention.inc.c, step.inc.c).


class Attention(Calls):
    """Axes: B rows, N tokens of all rows, H heads, P prefix, D head size."""

    def attention(
        self, rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor]:
        """y = dropout(softmax(scaling q k^T + bias)) v, for each row of an unpadded batch alone.

        Args:
            rows: The place of each row.
            q: (N, H, D), the last axis contiguous.
            k: (M, H_kv, D), likewise.
            v: (M, H_kv, D), likewise.
            prefixes: Come before the keys and values of their rows.
            dropped: Dropout of the probabilities.

        Returns:
            y (N, H, D), and the logarithm of each row's sum of exponentials, (N, H) float32, for the backward pass.
        """
        y, log_sum = q.new_empty(q.shape), torch.empty(q.shape[:2], dtype=torch.float32)
        struct = rows_struct(rows, q, k, v, prefixes, dropped)
        self._call("attention", q.dtype, ctypes.addressof(struct), q, k, v, y, log_sum, threads())
        return y, log_sum

    def attention_backward(
        self,
        rows: AttentionRows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefixes: Prefixes,
        dropped: DropoutArguments,
        dy: Tensor,
        log_sum: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of `attention`: (dq, dk, dv, dprefixes).

        dprefixes: (B, 2, H_kv, P, D) float32 with P of the longest prefix; the rest of a shorter one is zero.
        """
        dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype) for each in (q, k, v))
        if not rows.all_asked:
            dq.zero_()
        struct = rows_struct(rows, q, k, v, prefixes, dropped)
        dprefixes = torch.zeros(len(rows.query_starts), 2, k.shape[1], struct.most_prefix, q.shape[2])
        tensors = q, k, v, dy, log_sum, dq, dk, dv, dprefixes
        self._call("attention_backward", q.dtype, ctypes.addressof(struct), *tensors, threads())
        return dq, dk, dv, dprefixes

    def keep_step(
        self, kept: CachedKVArguments, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor
    ) -> None:
        """Write the newest token of each row to the cache. new_keys, new_values: (B, H_kv, D), of equal strides."""
        kept.require(keys, values)
        assert new_keys.shape == new_values.shape == kept.shape
        assert new_keys.stride() == new_values.stride()
        assert new_keys.stride(-1) == 1
        strides = new_keys.stride()[:2]
        self._call("keep_step", keys.dtype, kept.address, new_keys, new_values, *strides, keys, values)

    def attend_step(
        self, kept: CachedKVArguments, q: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int = 0
    ) -> Tensor:
        """softmax(scaling q K^T) V of one query per row.

        Args:
            kept: The rows of the cache.
            q: (B, H, D), the last axis contiguous.
            keys: (B, H_kv, S, D)
            values: (B, H_kv, S, D)
            scaling: Of the scores.
            window: 0 for none; else a key further back is seen only if it belongs to the prefix.

        Returns:
            (B, H, D)
        """
        kept.require(keys, values)
        rows, heads, dim = q.shape
        assert (rows, dim) == (kept.shape[0], kept.shape[2])
        assert heads % kept.shape[1] == 0
        assert q.stride(-1) == 1
        y = q.new_empty(q.shape)
        strides = q.stride()[:2]
        self._call(
            "attend_step", q.dtype, kept.address, q, *strides, heads, keys, values, scaling, window, y, threads()
        )
        return y


# --- compiled ---------------------------------------------------------------------------------------------------------


class Library(Operations, Attention, Products):
    """All kernels: the parts of a layer, and several whole layers in one call."""

    def encoder_layers(
        self, layers: Layers, x: Tensor, spans: AdapterSpans | None, told: Sequence[tuple[AttentionRows, Prefixes]]
    ) -> Tensor:
        """Several encoder layers on at most `few` tokens, without dropout; bit-equal to the kernels of their parts.

        Args:
            layers: The frozen weights.
            x: (..., D) of N tokens.
            spans: The adapters of the tokens.
            told: The rows and prefixes of each layer's attention.

        Returns:
            (..., D)
        """
        tokens = self._tokens(layers, EncoderLayer, x, spans)
        assert len(told) == len(layers)
        assert all(rows.all_asked for rows, _ in told)
        qkv = torch.empty(tokens, layers.heads, layers.dim, dtype=x.dtype, device="meta")  # their shape and strides
        structs = [rows_struct(rows, qkv, qkv, qkv, prefixes, NO_DROPOUT) for rows, prefixes in told]
        pointers = (ctypes.c_void_p * len(layers))(*(ctypes.addressof(each) for each in structs))
        y = torch.empty_like(x)
        rows = ctypes.addressof(pointers)
        arguments = layers.address, rows, len(layers), tokens, x.data_ptr(), at(spans), y.data_ptr()
        self._with_workspace("encoder_layers", layers, tokens, arguments)
        return y

    def decoder_layers(
        self,
        layers: Layers,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        spans: AdapterSpans | None,
        parts: Sequence[Sequence[tuple[CachedKVArguments, Tensor, Tensor]]],
    ) -> Tensor:
        """Several decoder layers on one new token of each row, at most `few`; bit-equal to the kernels of their parts.

        Args:
            layers: The frozen weights.
            x: (..., D) of N tokens.
            cos: (..., head size)
            sin: (..., head size)
            spans: The adapters of the tokens.
            parts: For each layer the blocks of the KV cache that hold the rows, in their order: keys and values
                (B, H_kv, S, head size). The new token is written there.

        Returns:
            (..., D)
        """
        tokens = self._tokens(layers, DecoderLayer, x, spans)
        for each in (cos, sin):
            assert each.is_contiguous()
            assert each.dtype == x.dtype
            assert each.numel() == tokens * layers.dim
        assert len(parts) == len(layers)
        count = len(parts[0])
        for layer in parts:
            assert len(layer) == count
            assert sum(kept.shape[0] for kept, _, _ in layer) == tokens
            for kept, keys, values in layer:
                kept.require(keys, values)
                assert keys.dtype == values.dtype == x.dtype
                assert kept.shape[1:] == (layers.kv_heads, layers.dim)
        structs = (PartStruct * (len(layers) * count))(
            *(PartStruct(kept.address, k.data_ptr(), v.data_ptr()) for layer in parts for kept, k, v in layer)
        )
        y = torch.empty_like(x)
        places = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), at(spans), count, ctypes.addressof(structs), y.data_ptr()
        arguments = layers.address, len(layers), tokens, *places
        self._with_workspace("decoder_layers", layers, tokens, arguments)
        return y

    def _tokens(self, layers: Layers, kind: type[Layer], x: Tensor, spans: AdapterSpans | None) -> int:
        assert layers.kind is kind
        tokens = x.numel() // layers.width
        assert x.is_contiguous()
        assert x.shape[-1] == layers.width
        assert x.dtype == layers.dtype
        assert 0 < tokens <= self._few[x.dtype]
        assert spans is None or spans.tokens == tokens
        return tokens

    def _with_workspace(self, name: str, layers: Layers, tokens: int, arguments: tuple[int | None, ...]) -> None:
        """Call a kernel with the workspace that it needs for that many tokens."""
        count = torch.get_num_threads()
        if tokens not in layers.workspaces:
            layers.workspaces[tokens] = self._workspace(name, layers.dtype, *arguments, None, count)
        workspace = torch.empty(layers.workspaces[tokens], dtype=torch.uint8)
        self._call(name, layers.dtype, *arguments, workspace.data_ptr(), count)

    def rest(self) -> None:
        """See `rest` below."""
        self._loaded.rest()


# --- check ------------------------------------------------------------------------------------------------------------
# Compare every kernel with torch when the library is loaded. A wrong kernel costs speed, not correctness.
#
# Layers in one call consist of the kernels that are checked here; tests compare them bit by bit.


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative to the largest element


def require_close(library: Library) -> None:
    """Raises NotBuilt with the name of the first kernel whose result differs from torch's."""
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in TOLERANCES.items():
        with torch.inference_mode(False), torch.enable_grad():  # the caller may have set the opposite
            results = _results(library, dtype, generator)
        for name, (given, expected) in results.items():
            off = (given.double() - expected.double()).abs().max() / expected.double().abs().max()
            if not bool(off <= tolerance):
                raise NotBuilt(f"kernel {name} in {dtype} is off by {float(off):.1e}")


def _results(library: Library, dtype: torch.dtype, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    results: dict[str, tuple[Tensor, Tensor]] = {}
    gate, up, dy = draw(3, 37), draw(3, 37), draw(3, 37)
    wide, wider = gate.double().requires_grad_(), up.double().requires_grad_()
    y = torch.nn.functional.silu(wide) * wider
    dgate, dup = torch.autograd.grad(y, (wide, wider), dy.double())
    results["swiglu"] = (library.swiglu(gate, up), y.detach())
    given = library.swiglu_backward(gate, up, dy)
    results |= {"swiglu_backward": (given[0], dgate), "swiglu_backward (up)": (given[1], dup)}
    y = torch.nn.functional.gelu(wide)
    results["gelu"] = (library.gelu(gate), y.detach())
    results["gelu_backward"] = (library.gelu_backward(gate, dy), torch.autograd.grad(y, wide, dy.double())[0])
    weight = draw(37)
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    y = weight.double() * (wide * r)
    normed, found = library.rms_norm(gate, weight, 1e-5)
    results["rms_norm"] = (normed, y.detach())
    expected = torch.autograd.grad(y, wide, dy.double())[0]
    results["rms_norm_backward"] = (library.rms_norm_backward(gate, weight, found, dy), expected)
    shift = draw(37)
    y = torch.nn.functional.layer_norm(wide + wider, (37,), weight.double(), shift.double(), 1e-5)
    normed, added, stats = library.added_norm(gate, up, weight, shift, 1e-5, NO_DROPOUT)
    results["added_norm"] = (normed, y.detach())
    results["added_norm_again"] = (library.added_norm_again(added, weight, shift, stats), y.detach())
    given = library.added_norm_backward(added, weight, stats, NO_DROPOUT, dy)
    results["added_norm_backward"] = (given[1], torch.autograd.grad(y, wide, dy.double())[0])
    x, angle = draw(5, 2, 8), torch.rand(5, 8, generator=generator)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1).double()
    results["rotate"] = (
        library.rotate(x, cos, sin, 1.0),
        x.double() * cos.double()[:, None] + turned * sin.double()[:, None],
    )
    ones = library.dropout(torch.ones(400, 100, dtype=dtype), DropoutArguments.of(0.25, 12345, torch.arange(400)))
    kept = float((ones > 0).double().mean())
    results["dropout"] = (ones.max()[None], torch.full((1,), 4 / 3 if abs(kept - 0.75) < 0.02 else 0.0))
    return (
        results
        | _checked_lora(library, draw)
        | _checked_low_rank(library, draw)
        | _checked_attention(library, draw)
        | _checked_step(library, draw)
    )


def _checked_lora(library: Library, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Five tokens and rank 13 use every block size."""
    x, y, dy, dx, A, B = draw(5, 64), draw(5, 32), draw(5, 32), draw(5, 64), draw(13, 64).float(), draw(32, 13).float()
    h, dh = x.double() @ A.double().mT, 0.5 * dy.double() @ B.double()
    expected = {"lora": y.double() + 0.5 * h @ B.double().mT, "lora dx": dx.double() + dh @ A.double()}
    expected |= {"lora dA": dh.mT @ x.double(), "lora dB": 0.5 * dy.double().mT @ h}
    found = library.lora(x, A, B, 0.5, NO_DROPOUT, y)
    given = y, dx, *library.lora_backward(x, A, B, 0.5, NO_DROPOUT, found, dy, dx)
    return {name: (one, each) for one, (name, each) in zip(given, expected.items(), strict=True)}


def _checked_low_rank(library: Library, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Spans of 40, 5 and 0 tokens, ranks 3 and 17, tokens without an adapter; sizes for tiles and odd sizes."""
    results = {}
    for d_in, d_out in ((64, 96), (37, 41)):
        x, y = draw(49, d_in), draw(49, d_out)
        factors = [(draw(3, d_in), draw(3, d_out)), (draw(17, d_in) / 2, draw(17, d_out) / 2)]
        wide = y.double()
        for (start, end), (A, B) in zip(((1, 41), (43, 48)), factors, strict=True):
            wide[start:end] += x[start:end].double() @ A.double().mT @ B.double()
        addresses = torch.tensor([[[0, 0], [A.data_ptr(), B.data_ptr()]] for A, B in (*factors, factors[1])])
        spans = AdapterSpans(
            torch.tensor([1, 43, 48]), torch.tensor([41, 48, 48]), torch.tensor([3, 17, 17]), addresses, len(x)
        )
        library.low_rank(spans, 1, x, y)
        results[f"low_rank {d_in}"] = (y, wide)
        A, B = draw(3, d_in).float(), draw(d_out, 3).float()
        run = draw(2 * 3 * (d_in + d_out))
        library.lay_out([(A, B), (A, B)], 2.0, run)
        results[f"lay_out {d_in}"] = (run, torch.cat([A.flatten(), 2.0 * B.mT.flatten()] * 2))
    return results


def _checked_attention(library: Library, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Two causal rows of 40 and 3 tokens, grouped heads, a prefix of 2 tokens for the second row."""
    q, k, v, dy = draw(43, 4, 24), draw(43, 2, 24), draw(43, 2, 24), draw(43, 4, 24)
    prefix = draw(2, 2, 24), draw(2, 2, 24)
    starts, lengths = torch.tensor([0, 40]), torch.tensor([40, 3])
    rows = AttentionRows(starts, lengths, starts, lengths, scaling=0.3, causal=True)
    prefixes = Prefixes([prefix], [None, 0])
    y, log_sum = library.attention(rows, q, k, v, prefixes, NO_DROPOUT)
    dq, dk, dv, dprefix = library.attention_backward(rows, q, k, v, prefixes, NO_DROPOUT, dy, log_sum)
    wide = [each.double().requires_grad_() for each in (q, k, v, *prefix)]
    expected = []
    for (start, end), P in (((0, 40), 0), ((40, 43), 2)):
        keys, values = (
            torch.cat([pre.transpose(0, 1)[:P], each[start:end]]).repeat_interleave(2, 1)
            for pre, each in ((wide[3], wide[1]), (wide[4], wide[2]))
        )
        scores = 0.3 * torch.einsum("thd,shd->hts", wide[0][start:end], keys)
        hidden = torch.arange(P + end - start)[None] > P + torch.arange(end - start)[:, None]
        P_ = scores.masked_fill(hidden, -1e30).softmax(-1)
        expected.append(torch.einsum("hts,shd->thd", P_, values))
    whole = torch.cat(expected)
    gradients = torch.autograd.grad(whole, wide, dy.double())
    names = ("attention dq", "attention dk", "attention dv")
    results = {"attention": (y, whole.detach())}
    results |= {name: (each, exact) for name, each, exact in zip(names, (dq, dk, dv), gradients[:3], strict=True)}
    results |= {f"attention prefix {i}": (dprefix[1, i], gradients[3 + i]) for i in (0, 1)}
    return results


def _checked_step(library: Library, draw: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A product of up to 5 tokens; three rows of 20, 1 and 7 keys, grouped heads, a prefix of 2 for the last row."""
    results = {}
    x, weight, bias = draw(5, 37), draw(19, 37), draw(19)
    x = x[: library.few(x.dtype)]
    if len(x):
        y, (A, B) = x.double() @ weight.double().mT + bias.double(), (draw(3, 37), draw(3, 19))
        results["linear"] = (library.linear(x, weight, bias), y)
        addresses = torch.tensor([[[A.data_ptr(), B.data_ptr()]]])
        spans = AdapterSpans(torch.tensor([1]), torch.tensor([len(x) - 1]), torch.tensor([3]), addresses, len(x))
        y = y.clone()
        y[1:-1] += x[1:-1].double() @ A.double().mT @ B.double()
        results["linear and its adapters"] = (library.linear(x, weight, bias, spans), y)
    keys, values, new_keys, new_values, q = (
        draw(3, 2, 24, 40),
        draw(3, 2, 24, 40),
        draw(3, 2, 40),
        draw(3, 2, 40),
        draw(3, 4, 40),
    )
    lengths, prefixes = torch.tensor([20, 1, 7]), torch.tensor([0, 0, 2])
    kept = CachedKVArguments(lengths, prefixes, keys)
    library.keep_step(kept, keys, values, new_keys, new_values)
    newest = [each[torch.arange(3), :, lengths - 1] for each in (keys, values)]
    results |= {"keep_step keys": (newest[0], new_keys), "keep_step values": (newest[1], new_values)}
    column = torch.arange(24)[None]
    hidden = (column >= lengths[:, None]) | ((lengths[:, None] - 1 - column >= 4) & (column >= prefixes[:, None]))
    wide = [each.double().repeat_interleave(2, 1) for each in (keys, values)]  # (3, 4, 24, 40)
    scores = 0.3 * torch.einsum("bhd,bhsd->bhs", q.double(), wide[0])
    y = torch.einsum("bhs,bhsd->bhd", scores.masked_fill(hidden[:, None], -1e30).softmax(-1), wide[1])
    results["attend_step"] = (library.attend_step(kept, q, keys, values, 0.3, window=4), y)
    return results


# --- the library of this process --------------------------------------------------------------------------------------
# Loaded or compiled, checked against torch, and switched off on request.


@functools.cache
def _load_library() -> tuple[Library | None, str]:
    try:
        loaded, origin = load()
        library = Library(loaded)
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            require_close(library)  # the pass that asked first may be one of `checkpoint`, which counts what is saved
    except (NotBuilt, AttributeError) as error:  # AttributeError: the library lacks a kernel
        return None, str(error)
    return library, origin


_off: ContextVar[bool] = ContextVar("off", default=False)


def library() -> Library | None:
    """The kernels, compiled if needed and checked at the first call; None if there are none."""
    return None if _off.get() else _load_library()[0]


@contextmanager
def without() -> Iterator[None]:
    """Compute in torch for the length of the block, in this thread: the reference for the kernels."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def why() -> str:
    """Where the kernels come from, or why there are none; for messages."""
    return _load_library()[1]


def rest() -> None:
    """End the idle OpenMP helper threads of the calling thread.

    If several threads of a process have helpers, GNU's OpenMP puts all of them to sleep between two operations, and a
    pass over 16 tokens takes up to 2x longer (two cores). The next parallel region creates new helpers.
    """
    if (found := _load_library()[0]) is not None:
        found.rest()


def usable(*tensors: Tensor) -> Library | None:
    """The kernels, if they support these tensors: on the CPU, all float32 or all bfloat16. Else None."""
    dtype = tensors[0].dtype
    if not tensors[0].is_cpu or dtype not in NAMES:
        return None
    for each in tensors:  # a loop, faster than any(): this runs hundreds of times per step
        if each.dtype != dtype:
            return None
    return library()
