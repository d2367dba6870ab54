"""The kernels as functions of tensors; shapes and strides are checked here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from turret.ops.cpu.layers import DecoderLayer, EncoderLayer, Layer, Layers
from turret.ops.cpu.operations import (
    AdapterSpans,
    CachedKVArguments,
    Calls,
    Int8Matrix,
    Operations,
    PartStruct,
    at,
    p,
    rows_struct,
    threads,
)
from turret.ops.structs import NO_DROPOUT, AttentionRows, DropoutArguments, Prefixes

# --- products ---------------------------------------------------------------------------------------------------------
# Matrix products: LoRA in training, many LoRAs in one batch, frozen layers in 8 bits, frozen layers on few tokens.


WAKING = 1 << 20  # multiplications in 0.1 ms of one thread; a sleeping thread takes 0.05 to 2 ms to wake
LONGEST_INT8 = 1 << 16  # most products of a sum in 8 bits: 2^16 * 255 * 127 fits 31 bits


class Products(Calls):
    """Axes: N tokens, R rank, S spans."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        super().__init__(loaded)
        self._int8_workspaces: dict[tuple[int, int, int, bool, torch.dtype, bool, int], int] = {}  # bytes

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
        arguments = *_lora(x, A, B), by, *dropped.seeds, dropped.threshold
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
        arguments = *_lora(x, A, B), by, *dropped.seeds, dropped.threshold
        self._call("lora_backward", x.dtype, *arguments, *map(p, (transposed, dh, h, dy, dx, dA, dB)), threads())
        return dA, dB

    def round_int8(self, weight: Tensor, turned: bool = False) -> Int8Matrix:
        """Round W once for many calls of `linear_int8`. W: (O, E), or (E, O) with `turned`. Requires `int8`."""
        outputs, deep = self._sizes_int8(weight, turned)
        rounded = Int8Matrix(torch.empty(outputs * (deep + 4), dtype=torch.uint8), outputs, deep, weight.dtype)
        count = torch.get_num_threads()
        workspace = torch.empty(count, 16 * deep, dtype=torch.uint8)
        addresses = weight.data_ptr(), rounded.bytes.data_ptr(), workspace.data_ptr()
        self._call("round_int8", weight.dtype, *addresses, deep, outputs, turned, count)
        return rounded

    def linear_int8(self, x: Tensor, weight: Tensor | Int8Matrix, bias: Tensor | None, turned: bool = False) -> Tensor:
        """x W^T + b in 8 bits: x is rounded with a scale for each token, W with a scale for each output.

        Args:
            x: (N, E); E is a multiple of 64.
            weight: W as (O, E), as (E, O) with `turned`, or rounded before; O is a multiple of 32.
            bias: (O,) or None.
            turned: W is stored transposed, so the product is x W.

        Returns:
            (N, O). Requires `int8`.
        """
        addresses: tuple[int | None, int | None]  # of W, and of W rounded
        if rounded := isinstance(weight, Int8Matrix):
            (outputs, deep), addresses = (weight.outputs, weight.deep), (None, weight.bytes.data_ptr())
        else:
            (outputs, deep), addresses = self._sizes_int8(weight, turned), (weight.data_ptr(), None)
        tokens, own = x.shape
        assert own == deep
        assert x.is_contiguous()
        assert weight.dtype == x.dtype
        assert bias is None or (bias.is_contiguous() and bias.dtype == x.dtype and bias.shape == (outputs,))
        y = x.new_empty(tokens, outputs)
        arguments = (
            x.data_ptr(),
            *addresses,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            tokens,
            deep,
            outputs,
            turned,
        )
        count = torch.get_num_threads()
        if (key := (tokens, deep, outputs, turned, x.dtype, rounded, count)) not in self._int8_workspaces:
            self._int8_workspaces[key] = self._workspace("linear_int8", x.dtype, *arguments, None, count)
        workspace = torch.empty(self._int8_workspaces[key], dtype=torch.uint8)
        self._call("linear_int8", x.dtype, *arguments, workspace.data_ptr(), count)
        return y

    def _sizes_int8(self, weight: Tensor, turned: bool) -> tuple[int, int]:
        """(O, E)"""
        outputs, deep = weight.shape[::-1] if turned else weight.shape
        assert self.int8
        assert deep % 64 == outputs % 32 == 0
        assert deep <= LONGEST_INT8
        assert weight.is_contiguous()
        return outputs, deep

    def low_rank(self, spans: AdapterSpans, layer: int, x: Tensor, y: Tensor) -> None:
        """y += (x A^T) B for each span of tokens with one adapter, summed in float32 (SGMV).

        The reference is `turret.ops.mixed_lora.sgmv`.

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
        arguments = spans.address, layer, x.data_ptr(), y.data_ptr(), d_in, d_out
        self._call("low_rank", x.dtype, *arguments, torch.get_num_threads())

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
        arguments = addresses.data_ptr(), sizes.data_ptr(), len(factors), rank, by, run.data_ptr()
        self._call("lay_out", run.dtype, *arguments)

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
        self._call(
            "linear",
            x.dtype,
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            tokens,
            d_in,
            d_out,
            at(spans),
            layer,
            count,
        )
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
        self._call("attention", q.dtype, _address(struct), p(q), p(k), p(v), p(y), p(log_sum), threads())
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
        dprefixes = torch.zeros(rows.count, 2, k.shape[1], struct.most_prefix, q.shape[2])
        self._call(
            "attention_backward",
            q.dtype,
            _address(struct),
            p(q),
            p(k),
            p(v),
            p(dy),
            p(log_sum),
            p(dq),
            p(dk),
            p(dv),
            p(dprefixes),
            threads(),
        )
        return dq, dk, dv, dprefixes

    def keep_step(
        self, kept: CachedKVArguments, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor
    ) -> None:
        """Write the newest token of each row to the cache. new_keys, new_values: (B, H_kv, D), of equal strides."""
        kept.require(keys, values)
        assert new_keys.shape == new_values.shape == kept.shape
        assert new_keys.stride() == new_values.stride()
        assert new_keys.stride(-1) == 1
        new = new_keys.data_ptr(), new_values.data_ptr(), *new_keys.stride()[:2]
        self._call("keep_step", keys.dtype, kept.address, *new, keys.data_ptr(), values.data_ptr())

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
        self._call(
            "attend_step",
            q.dtype,
            kept.address,
            q.data_ptr(),
            *q.stride()[:2],
            heads,
            keys.data_ptr(),
            values.data_ptr(),
            scaling,
            window,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y


def _address(struct: ctypes.Structure) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(struct))


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
        arguments = (
            layers.address,
            ctypes.addressof(pointers),
            len(layers),
            tokens,
            x.data_ptr(),
            at(spans),
            y.data_ptr(),
        )
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
            layers.address,
            len(layers),
            tokens,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            at(spans),
            count,
            ctypes.addressof(structs),
            y.data_ptr(),
        )
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
        """See `turret.ops.cpu.rest`."""
        self._loaded.rest()
