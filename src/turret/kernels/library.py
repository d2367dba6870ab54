"""The kernels as functions of tensors: shapes and strides checked here, memory and threads handed to C.

`library()` is None where there are none; every caller then takes its plain path. Refuses to know autograd and modules.
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

from turret.kernels.arguments import KEPT, Kept, PartWords, Prefixes, Rows, Spans, words_of
from turret.kernels.attention import Attention
from turret.kernels.build import NotBuilt, library_path
from turret.kernels.calls import NAMES, at, threads
from turret.kernels.layers import DecoderLayer, EncoderLayer, Layer
from turret.kernels.operations import Operations
from turret.kernels.products import Products

LARGEST = 1 << 32  # elements a mask can number


class Library(Operations, Attention, Products):
    """All of them: what a layer is made of, and whole layers in one call."""

    def encoder_layer(
        self, layer: EncoderLayer, x: Tensor, spans: Spans | None, rows: Rows, prefixes: Prefixes
    ) -> Tensor:
        """The whole layer on at most `few` tokens, dropout off: the same numbers as its parts give. x: (..., D)."""
        tokens = self._layers_tokens(layer, x, spans)
        assert rows.all_asked
        like = torch.empty(tokens, layer.heads, layer.dim, dtype=x.dtype, device="meta")  # of queries, keys and values
        words, _kept = words_of(rows, like, like, like, prefixes, KEPT)
        y = torch.empty_like(x)
        told = (layer.address, ctypes.addressof(words), tokens, x.data_ptr(), at(spans), y.data_ptr())
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
            layer.address, tokens, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), at(spans), len(parts),
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
        helpers = torch.get_num_threads()
        if tokens not in layer.room:
            layer.room[tokens] = self._call(name, layer.dtype, *told, None, helpers)
        room = torch.empty(layer.room[tokens], dtype=torch.uint8)
        self._call(name, layer.dtype, *told, room.data_ptr(), helpers)

    def rest(self) -> None:
        self._loaded.rest()

    def wake(self) -> None:
        self._loaded.wake(threads())


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


def int8() -> bool:
    """Whether there are kernels here that multiply in 8 bits."""
    found = library()
    return found is not None and found.int8


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
