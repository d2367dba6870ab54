"""The kernels as functions of tensors; shapes and strides are checked here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from turret.kernels.arguments import (
    NO_DROPOUT,
    AdapterSpans,
    AttentionRows,
    CachedKVArguments,
    PartStruct,
    Prefixes,
    rows_struct,
)
from turret.kernels.attention import Attention
from turret.kernels.calls import at
from turret.kernels.layers import DecoderLayer, EncoderLayer, Layer, Layers
from turret.kernels.operations import Operations
from turret.kernels.products import Products


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
        arguments = (
            layers.address, ctypes.addressof(pointers), len(layers), tokens, x.data_ptr(), at(spans), y.data_ptr(),
        )  # fmt: skip
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
        arguments = (
            layers.address, len(layers), tokens, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), at(spans), count,
            ctypes.addressof(structs), y.data_ptr(),
        )  # fmt: skip
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
        """See `turret.kernels.rest`."""
        self._loaded.rest()
