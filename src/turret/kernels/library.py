"""The kernels as functions of tensors: shapes and strides checked here, memory and threads handed to C.

`library()` is None where there are none; every caller then takes its plain path. Refuses to know autograd and modules.
Axes: B rows, N tokens of all rows, H heads, P prefix, D head size.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from turret.kernels.arguments import KEPT, Dropped, Kept, PartWords, Prefixes, Rows, Spans, words_of
from turret.kernels.build import NotBuilt, library_path
from turret.kernels.layers import DecoderLayer, EncoderLayer, Layer

NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
LARGEST = 1 << 32  # elements a mask can number
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_LORA = (*(_LONG,) * 4, *(_POINTER,) * 3, ctypes.c_float, *(ctypes.c_uint32,) * 3)
DECLARED = {  # arguments as plain numbers, where a kernel is called once a layer
    "low_rank": (_POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, ctypes.c_int),
    "linear": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, ctypes.c_int),
    "keep_step": (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER),
    "attend_step": (
        *(_POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER),
        *(ctypes.c_float, _LONG, _POINTER, ctypes.c_int),
    ),
    "lora": (*_LORA, *(_POINTER,) * 3, ctypes.c_int),
    "lora_backward": (*_LORA, *(_POINTER,) * 7, ctypes.c_int),
    "encoder_layer": (_POINTER, _POINTER, _LONG, *(_POINTER,) * 4, ctypes.c_int),
    "decoder_layer": (_POINTER, _LONG, *(_POINTER,) * 4, _LONG, *(_POINTER,) * 3, ctypes.c_int),
}
RETURNED = {"encoder_layer": _LONG, "decoder_layer": _LONG}


class Library:
    """The loaded kernels. Tensors are on the CPU, contiguous where nothing else is said, and of one dtype."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        self._few = {dtype: int(getattr(loaded, f"linear_up_to_{name}")()) for dtype, name in NAMES.items()}

    def _call(self, name: str, dtype: torch.dtype, *arguments: Any) -> Any:
        function = self._functions.get((name, dtype))
        if function is None:
            function = getattr(self._loaded, f"{name}_{NAMES[dtype]}")
            function.argtypes, function.restype = DECLARED.get(name), RETURNED.get(name)
            self._functions[name, dtype] = function
        return function(*arguments)

    def rest(self) -> None:
        self._loaded.rest()

    def wake(self) -> None:
        self._loaded.wake(_threads())

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        y = torch.empty_like(gate)
        self._call("swiglu", gate.dtype, _n(gate), _p(gate), _p(up), _p(y), _threads())
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self._call("swiglu_backward", gate.dtype, _n(gate), _p(gate), _p(up), _p(dy), _p(dgate), _p(dup), _threads())
        return dgate, dup

    def gelu(self, x: Tensor) -> Tensor:
        """x Phi(x), Phi the normal distribution."""
        y = torch.empty_like(x)
        self._call("gelu", x.dtype, _n(x), _p(x), _p(y), _threads())
        return y

    def gelu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        dx = torch.empty_like(x)
        self._call("gelu_backward", x.dtype, _n(x), _p(x), _p(dy), _p(dx), _threads())
        return dx

    def dropout(self, x: Tensor, dropped: Dropped, scale: float | None = None) -> Tensor:
        """x where it is kept, times `scale` (1 / (1 - p) where left out), zero elsewhere."""
        y = torch.empty_like(x)
        by = ctypes.c_float(dropped.scale if scale is None else scale)
        first, second = (ctypes.c_uint32(seed) for seed in dropped.seeds)
        self._call(
            "dropout", x.dtype, _n(x), _p(x), _p(y), first, second, ctypes.c_uint32(dropped.threshold), by, _threads()
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(weight * x r, r) with r = 1 / sqrt(mean(x^2) + eps), (...,) float32."""
        width = x.shape[-1]
        y, r = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        rows = ctypes.c_long(r.numel())
        self._call(
            "rms_norm", x.dtype, rows, ctypes.c_long(width), _p(x), _p(weight), ctypes.c_float(eps), _p(y), _p(r),
            _threads(),
        )  # fmt: skip
        return y, r

    def rms_norm_backward(self, x: Tensor, weight: Tensor, r: Tensor, dy: Tensor) -> Tensor:
        dx = torch.empty_like(x)
        rows, width = ctypes.c_long(r.numel()), ctypes.c_long(x.shape[-1])
        self._call("rms_norm_backward", x.dtype, rows, width, _p(x), _p(weight), _p(r), _p(dy), _p(dx), _threads())
        return dx

    def added_norm(
        self, a: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dropped: Dropped
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(LayerNorm of s, s = dropout(a) + x, mean and 1 / deviation of each row of s (..., 2) float32)."""
        s, y, stats = torch.empty_like(a), torch.empty_like(a), torch.empty(*a.shape[:-1], 2, dtype=torch.float32)
        rows, width = ctypes.c_long(stats.numel() // 2), ctypes.c_long(a.shape[-1])
        self._call(
            "added_norm", a.dtype, rows, width, *map(_p, (a, x, weight, bias)), ctypes.c_float(eps), *_mask(dropped),
            *map(_p, (s, y, stats)), _threads(),
        )  # fmt: skip
        return y, s, stats

    def added_norm_again(self, s: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> Tensor:
        """The LayerNorm that `added_norm` gave, from the s and stats that it gave beside."""
        y = torch.empty_like(s)
        rows, width = ctypes.c_long(stats.numel() // 2), ctypes.c_long(s.shape[-1])
        self._call("added_norm_again", s.dtype, rows, width, *map(_p, (s, weight, bias, stats, y)), _threads())
        return y

    def added_norm_backward(
        self, s: Tensor, weight: Tensor, stats: Tensor, dropped: Dropped, dy: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(da, dx)."""
        da, dx = torch.empty_like(s), torch.empty_like(s)
        rows, width = ctypes.c_long(stats.numel() // 2), ctypes.c_long(s.shape[-1])
        self._call(
            "added_norm_backward", s.dtype, rows, width, *map(_p, (s, weight, stats, dy)), *_mask(dropped), _p(da),
            _p(dx), _threads(),
        )  # fmt: skip
        return da, dx

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        """x: (N, H, D) whose last axis is contiguous; cos, sin: (N, D). Contiguous (N, H, D)."""
        tokens, heads, dim = x.shape
        y = x.new_empty(tokens, heads, dim)
        self._call(
            "rotate", x.dtype, *map(ctypes.c_long, (tokens, heads, dim)), _p(x), *map(ctypes.c_long, x.stride()[:2]),
            _p(cos), _p(sin), ctypes.c_float(sign), _p(y), _threads(),
        )  # fmt: skip
        return y

    def attention(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: Dropped
    ) -> tuple[Tensor, Tensor]:
        """(y (N, H, D), log_sum (N, H) float32) of every row of an unpadded batch by itself.

        q: (N, H, D); k, v: (M, H_kv, D), the last axis contiguous. y = dropout(softmax(scaling q k^T + bias)) v.
        """
        y, log_sum = q.new_empty(q.shape), torch.empty(q.shape[:2], dtype=torch.float32)
        words, _kept = words_of(rows, q, k, v, prefixes, dropped)
        self._call("attention", q.dtype, ctypes.byref(words), _p(q), _p(k), _p(v), _p(y), _p(log_sum), _threads())
        return y, log_sum

    def attention_backward(
        self,
        rows: Rows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefixes: Prefixes,
        dropped: Dropped,
        dy: Tensor,
        log_sum: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(dq, dk, dv, dprefixes (B, 2, H_kv, P, D) float32 with P of the longest prefix; a shorter one has less)."""
        dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype) for each in (q, k, v))
        if not rows.all_asked:
            dq.zero_()
        words, _kept = words_of(rows, q, k, v, prefixes, dropped)
        dprefixes = torch.zeros(rows.count, 2, k.shape[1], words.most_prefix, q.shape[2])
        self._call("attention_backward", q.dtype, ctypes.byref(words), _p(q), _p(k), _p(v), _p(dy), _p(log_sum), _p(dq),
                   _p(dk), _p(dv), _p(dprefixes), _threads())  # fmt: skip
        return dq, dk, dv, dprefixes

    def lora(self, x: Tensor, A: Tensor, B: Tensor, by: float, dropped: Dropped, y: Tensor) -> Tensor:
        """y += by (dropout(x) A^T) B^T, where dropout does not scale; gives h = dropout(x) A^T (N, R) float32.

        x: (N, D_in), y: (N, D_out) of one dtype, D_in and D_out multiples of 32; A: (R, D_in), B: (D_out, R) float32.
        """
        turned, h = torch.empty_like(B), torch.empty(len(x), len(A))
        told = *_lora(x, A, B), by, *dropped.seeds, dropped.threshold
        self._call("lora", x.dtype, *told, *map(_p, (turned, h, y)), _threads())
        return h

    def lora_backward(
        self,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        by: float,
        dropped: Dropped,
        h: Tensor,
        dy: Tensor,
        dx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(dA, dB); dx, where it is wanted, holds dy W and is added to."""
        dA, dB, turned, dh = (torch.empty_like(each) for each in (A, B, B, h))
        told = *_lora(x, A, B), by, *dropped.seeds, dropped.threshold
        self._call("lora_backward", x.dtype, *told, *map(_p, (turned, dh, h, dy, dx, dA, dB)), _threads())
        return dA, dB

    def low_rank(self, spans: Spans, layer: int, x: Tensor, y: Tensor) -> None:
        """y += (x A^T) B of every span, added up in float32. x: (..., D_in), y: (..., D_out) of N tokens.

        Rows of no span stay as they are.
        """
        d_in, d_out = x.shape[-1], y.shape[-1]
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert layer < spans.layers
        assert x.numel() == spans.tokens * d_in
        assert y.numel() == spans.tokens * d_out
        threads = torch.get_num_threads()
        self._call("low_rank", x.dtype, spans.address, layer, x.data_ptr(), y.data_ptr(), d_in, d_out, threads)

    def few(self, dtype: torch.dtype) -> int:
        """Tokens up to which `linear` is for; 0 where torch's own product is as quick for any number."""
        return self._few[dtype]

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, spans: Spans | None = None, layer: int = 0
    ) -> Tensor:
        """x W^T + b of at most `few` tokens, and (x A^T) B of each span, added up in float32 and rounded once.

        x: (..., D_in), weight: (D_out, D_in) -> (..., D_out).
        """
        d_out, d_in = weight.shape
        tokens = x.numel() // d_in
        assert x.is_contiguous()
        assert weight.is_contiguous()
        assert x.shape[-1] == d_in
        assert tokens <= self._few[x.dtype]
        assert spans is None or (spans.tokens == tokens and layer < spans.layers)
        y = x.new_empty(*x.shape[:-1], d_out)
        self._call(
            "linear", x.dtype, x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
            tokens, d_in, d_out, _at(spans), layer, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def keep_step(self, kept: Kept, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """The newest token of every row into the cache. new_keys, new_values: (B, H_kv, D), of the same strides."""
        kept.require(keys, values)
        assert new_keys.shape == new_values.shape == kept.shape
        assert new_keys.stride() == new_values.stride()
        assert new_keys.stride(-1) == 1
        new = new_keys.data_ptr(), new_values.data_ptr(), *new_keys.stride()[:2]
        self._call("keep_step", keys.dtype, kept.address, *new, keys.data_ptr(), values.data_ptr())

    def attend_step(
        self, kept: Kept, q: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int = 0
    ) -> Tensor:
        """softmax(scaling q K^T) V of one query a row: q (B, H, D) whose last axis is contiguous -> (B, H, D)."""
        kept.require(keys, values)
        rows, heads, dim = q.shape
        assert (rows, dim) == (kept.shape[0], kept.shape[2])
        assert heads % kept.shape[1] == 0
        assert q.stride(-1) == 1
        y = q.new_empty(q.shape)
        self._call(
            "attend_step", q.dtype, kept.address, q.data_ptr(), *q.stride()[:2], heads, keys.data_ptr(),
            values.data_ptr(), scaling, window, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y

    def encoder_layer(
        self, layer: EncoderLayer, x: Tensor, spans: Spans | None, rows: Rows, prefixes: Prefixes
    ) -> Tensor:
        """The whole layer on at most `few` tokens, dropout off: the same numbers as its parts give. x: (..., D)."""
        tokens = self._layers_tokens(layer, x, spans)
        assert rows.all_asked
        like = torch.empty(tokens, layer.heads, layer.dim, dtype=x.dtype, device="meta")  # of queries, keys and values
        words, _kept = words_of(rows, like, like, like, prefixes, KEPT)
        y = torch.empty_like(x)
        told = (layer.address, ctypes.addressof(words), tokens, x.data_ptr(), _at(spans), y.data_ptr())
        self._in_room("encoder_layer", layer, tokens, told)
        return y

    def decoder_layer(
        self,
        layer: DecoderLayer,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        spans: Spans | None,
        parts: Sequence[tuple[Kept, Tensor, Tensor]],
    ) -> Tensor:
        """The whole layer on the next token of every row, at most `few` of them: the same numbers as its parts give.

        x: (..., D) of N tokens, cos, sin: (..., head size). parts: what the cache holds of the rows, in their order,
        keys and values (B, H_kv, S, head size); the new ones are kept there.
        """
        tokens = self._layers_tokens(layer, x, spans)
        for each in (cos, sin):
            assert each.is_contiguous()
            assert each.dtype == x.dtype
            assert each.numel() == tokens * layer.dim
        assert sum(kept.shape[0] for kept, _, _ in parts) == tokens
        for kept, keys, values in parts:
            kept.require(keys, values)
            assert keys.dtype == values.dtype == x.dtype
            assert kept.shape[1:] == (layer.kv_heads, layer.dim)
        words = (PartWords * len(parts))(
            *(PartWords(kept.address, keys.data_ptr(), values.data_ptr()) for kept, keys, values in parts)
        )
        y = torch.empty_like(x)
        told = (
            layer.address, tokens, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), _at(spans), len(parts),
            ctypes.addressof(words), y.data_ptr(),
        )  # fmt: skip
        self._in_room("decoder_layer", layer, tokens, told)
        return y

    def _layers_tokens(self, layer: Layer, x: Tensor, spans: Spans | None) -> int:
        tokens = x.numel() // layer.width
        assert x.is_contiguous()
        assert x.shape[-1] == layer.width
        assert x.dtype == layer.dtype
        assert 0 < tokens <= self._few[x.dtype]
        assert spans is None or spans.tokens == tokens
        return tokens

    def _in_room(self, name: str, layer: Layer, tokens: int, told: tuple[Any, ...]) -> None:
        """The call, with the memory that it says it needs for so many tokens."""
        threads = torch.get_num_threads()
        if tokens not in layer.room:
            layer.room[tokens] = self._call(name, layer.dtype, *told, None, threads)
        room = torch.empty(layer.room[tokens], dtype=torch.uint8)
        self._call(name, layer.dtype, *told, room.data_ptr(), threads)


def _at(spans: Spans | None) -> int | None:
    return None if spans is None else spans.address


def _p(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _n(x: Tensor) -> ctypes.c_long:
    return ctypes.c_long(x.numel())


def _mask(dropped: Dropped) -> tuple[Any, ...]:
    """seed, other, threshold, scale"""
    return *map(ctypes.c_uint32, (*dropped.seeds, dropped.threshold)), ctypes.c_float(dropped.scale)


def _lora(x: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """tokens, D_in, D_out, R, x, A, B"""
    (rank, d_in), d_out = A.shape, len(B)
    assert B.shape == (d_out, rank)
    assert d_in % 32 == d_out % 32 == 0
    assert x.is_contiguous()
    assert x.shape == (len(x), d_in)
    assert A.is_contiguous()
    assert B.is_contiguous()
    assert A.dtype == B.dtype == torch.float32
    return len(x), d_in, d_out, rank, x.data_ptr(), A.data_ptr(), B.data_ptr()


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


@functools.cache
def _found() -> tuple[Library | None, str]:
    from turret.kernels import check

    try:
        path = library_path()
        loaded = ctypes.CDLL(str(path))
        if not loaded.ready():
            raise NotBuilt("the system does not grant the processor's matrix tiles")
        library = Library(loaded)
        check.require(library)
    except (NotBuilt, OSError, AttributeError) as error:
        return None, str(error)
    return library, f"compiled as {path.name}"


_off: ContextVar[bool] = ContextVar("off", default=False)


def library() -> Library | None:
    """The kernels of this machine, built and checked at the first call; None where there are none."""
    return None if _off.get() else _found()[0]


@contextmanager
def without() -> Iterator[None]:
    """The plain path for the length of the block: what the kernels are compared with."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def why() -> str:
    """How `library` ended, for people."""
    return _found()[1]


def rest() -> None:
    """End the idle helper threads of the calling thread, which another thread's work would wait for.

    Where several threads of a process keep helpers, a pass over 16 tokens takes up to twice as long (GNU's OpenMP on
    two cores). One who goes on after it makes them anew: see `wake`.
    """
    if (found := _found()[0]) is not None:
        found.rest()


def wake() -> None:
    """Have the helper threads of the calling thread awake, each on a processor of its own, before work that is short.

    A first region would wait 5 to 10 ms for helpers that are new, and some for those that slept; this takes 3 and 0.3.
    """
    if (found := _found()[0]) is not None:
        found.wake()


def usable(*tensors: Tensor) -> Library | None:
    """The kernels, if they can take these tensors: on the CPU and all of one dtype that they know."""
    dtype = tensors[0].dtype
    if not tensors[0].is_cpu or dtype not in NAMES:
        return None
    for each in tensors:  # a loop in place of any(): this is asked some hundred times a step
        if each.dtype != dtype:
            return None
    return library()
