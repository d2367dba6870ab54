"""The kernels as functions of tensors: shapes and strides checked here, memory and threads handed to C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from turret.kernels.arguments import (
    NO_DROPOUT,
    AdapterSpans,
    AttentionRows,
    CachedKVArguments,
    PartWords,
    Prefixes,
    words_of,
)
from turret.kernels.attention import Attention
from turret.kernels.calls import at, threads
from turret.kernels.layers import DecoderLayer, EncoderLayer, Layer, Layers
from turret.kernels.operations import Operations
from turret.kernels.products import Products


class Library(Operations, Attention, Products):
    """All of them: what a layer is made of, and rows of whole layers in one call."""

    def encoder_layers(
        self, layers: Layers, x: Tensor, spans: AdapterSpans | None, told: Sequence[tuple[AttentionRows, Prefixes]]
    ) -> Tensor:
        """Whole layers on at most `few` tokens, dropout off: the same numbers as their parts give. x: (..., D).

        told: of every layer, where rows lie and what they see.
        """
        tokens = self._tokens(layers, EncoderLayer, x, spans)
        assert len(told) == len(layers)
        assert all(rows.all_asked for rows, _ in told)
        like = torch.empty(
            tokens, layers.heads, layers.dim, dtype=x.dtype, device="meta"
        )  # of queries, keys and values
        words = [words_of(rows, like, like, like, prefixes, NO_DROPOUT) for rows, prefixes in told]
        every = (ctypes.c_void_p * len(layers))(*(ctypes.addressof(each) for each, _ in words))
        y = torch.empty_like(x)
        numbers = layers.address, ctypes.addressof(every), len(layers), tokens, x.data_ptr(), at(spans), y.data_ptr()
        self._in_room("encoder_layers", layers, tokens, numbers)
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
        """Whole layers on the next token of every layers, at most `few` of them: the same numbers as their parts give.

        x: (..., D) of N tokens, cos, sin: (..., head size). parts: what the cache holds of the rows, in their order,
        for every layer, keys and values (B, H_kv, S, head size); the new ones are kept there.
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
        words = (PartWords * (len(layers) * count))(
            *(PartWords(kept.address, k.data_ptr(), v.data_ptr()) for layer in parts for kept, k, v in layer)
        )
        y = torch.empty_like(x)
        told = (
            layers.address, len(layers), tokens, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), at(spans), count,
            ctypes.addressof(words), y.data_ptr(),
        )  # fmt: skip
        self._in_room("decoder_layers", layers, tokens, told)
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

    def _in_room(self, name: str, layers: Layers, tokens: int, told: tuple[Any, ...]) -> None:
        """The call, with the memory that it says it needs for so many tokens."""
        helpers = torch.get_num_threads()
        if tokens not in layers.room:
            layers.room[tokens] = self._call(name, layers.dtype, *told, None, helpers)
        room = torch.empty(layers.room[tokens], dtype=torch.uint8)
        self._call(name, layers.dtype, *told, room.data_ptr(), helpers)

    def rest(self) -> None:
        self._loaded.rest()

    def wake(self) -> None:
        self._loaded.wake(threads())
