"""The operations of a CPU: by the kernels in C where they are faster than torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from turret.ops.core import KVStep, LayerWeights, LoraGradients, Loras, NumberedMatrix, Ops, WholeLayers, enabled
from turret.ops.cpu.compiled import (
    CachedKVArguments,
    DecoderLayer,
    EncoderLayer,
    Layer,
    LayerMatrix,
    Layers,
    Library,
)
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


class CpuOps(Ops):
    """By a library, for one dtype."""

    kernels = True
    layouts = frozenset({"post-norm", "pre-norm"})

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        self.library, self.dtype = library, dtype

    # --- frozen products ----------------------------------------------------------------------------------------------

    def few(self) -> int:
        return self.library.few(self.dtype)

    def tiled(self) -> bool:
        return self.library.tiled(self.dtype)

    def linear_few(self, x: Tensor, weight: Tensor, bias: Tensor | None, helped: bool = True) -> Tensor:
        return self.library.linear(x, weight, bias, helped=helped)

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
        numbered, heads, (first, last) = [LayerMatrix(*each) for each in matrices], head_norms or (), norms
        biases = [each.bias for each in norms if isinstance(each, LayerNorm)]
        own = [*biases, *(each.weight for each in (*norms, *heads))]
        tensors = [*own, *(each for _, W, b in matrices for each in (W, b) if each is not None)]
        if not all(each.dtype == self.dtype and each.is_contiguous() and each.is_cpu for each in tensors):
            return None
        if isinstance(first, LayerNorm) and isinstance(last, LayerNorm):
            return EncoderLayer(numbered, (first, last), dim)
        if any(each.eps != first.eps for each in heads):
            return None
        q, k = (each.weight for each in heads) if heads else (None, None)
        weights = first.weight, q, k, last.weight
        return DecoderLayer(numbered, weights, (first.eps, last.eps), dim=dim, scaling=scaling, window=window)

    def whole_layers(self, layers: Sequence[LayerWeights]) -> WholeLayers:
        return CpuLayers(self.library, layers)

    def lay_out(self, factors: Sequence[tuple[Tensor, Tensor]], scaling: float, flat: Tensor) -> None:
        parts = [each for pair in factors for each in pair]
        if all(each.dtype == torch.float32 and each.is_contiguous() and each.is_cpu for each in parts):
            self.library.lay_out(list(factors), scaling, flat)
        else:
            super().lay_out(factors, scaling, flat)

    # --- LoRA ---------------------------------------------------------------------------------------------------------

    def takes_lora(self, loras: Loras) -> bool:
        """Widths that are multiples of 32; factors in float32, contiguous."""
        factors = [each for lora in loras if lora is not None for each in (lora.A.mT, lora.B)]
        plain = all(each.dtype == torch.float32 and len(each) % 32 == 0 for each in factors)
        return plain and all(lora is None or (lora.A.is_contiguous() and lora.B.is_contiguous()) for lora in loras)

    def add_lora(self, y: Sequence[Tensor], x: Tensor, loras: Loras, plus: Tensor | None = None) -> list[Tensor]:
        """Multiplied and added up in float32."""
        inner = []
        for own, lora in zip(y, loras, strict=True):
            if lora is not None:
                inner.append(self.library.lora(x, lora.A, lora.B, lora.scale, _dropout_arguments(lora), own))
            if plus is not None:
                own.add_(plus)
        return inner

    def lora_backward(
        self, loras: Loras, x: Callable[[], Tensor], inner: Sequence[Tensor], dy: Sequence[Tensor], dx: Tensor | None
    ) -> LoraGradients:
        gradients: LoraGradients = []
        hidden = iter(inner)
        for own, lora in zip(dy, loras, strict=True):
            if lora is not None:
                h = next(hidden)
                gradients += self.library.lora_backward(
                    x(), lora.A, lora.B, lora.scale, _dropout_arguments(lora), h, own, dx
                )
        return gradients

    # --- norms, activations, positions --------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor | None]:
        return self.library.rms_norm(x, *norm)

    def rms_norm_backward(
        self, x: Tensor, norm: RMSNorm, r: Tensor | None, dy: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        assert r is not None
        dx = self.library.rms_norm_backward(x, norm.weight, r, dy)
        return dx if plus is None else dx.add_(plus)

    def added_norm(self, a: Tensor, x: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
        return self.library.added_norm(a, x, *norm)

    def added_norm_again(self, s: Tensor, norm: LayerNorm, stats: Tensor) -> Tensor:
        """Bit-equal to the first time."""
        return self.library.added_norm_again(s, norm.weight, norm.bias, stats)

    def added_norm_backward(self, s: Tensor, norm: LayerNorm, stats: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return self.library.added_norm_backward(s, norm.weight, stats, norm.dropped, dy)

    def dropout(self, x: Tensor, dropped: DropoutArguments, scale: float) -> Tensor:
        return self.library.dropout(x, dropped, scale)

    def gelu(self, x: Tensor) -> Tensor:
        return self.library.gelu(x)

    def gelu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        return self.library.gelu_backward(x, dy)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.library.swiglu(gate, up)

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return self.library.swiglu_backward(gate, up, dy)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        return self.library.rotate(q, cos, sin, sign), self.library.rotate(k, cos, sin, sign)

    # --- attention ----------------------------------------------------------------------------------------------------

    def takes_attention(
        self, dim: int, *, p: float, biased: bool, window: bool, prefixed: bool, all_asked: bool
    ) -> bool:
        return self.attends

    def attention(
        self, rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor]:
        return self.library.attention(rows, q, k, v, prefixes, dropped)

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
        dq, dk, dv, all_rows = self.library.attention_backward(rows, q, k, v, prefixes, dropped, dy, log_sum)
        return dq, dk, dv, list(_of_prefixes(all_rows, prefixes))

    def kv_step(self, lengths: Tensor, prefixes: Tensor, like: Tensor) -> KVStep | None:
        return CpuKVStep(self.library, lengths, prefixes, like)


class CpuKVStep(CachedKVArguments):
    """See `core.KVStep`."""

    def __init__(self, library: Library, lengths: Tensor, prefixes: Tensor, like: Tensor) -> None:
        super().__init__(lengths, prefixes, like)
        self._library, self._dtype = library, like.dtype

    def keep(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> bool:
        alike = new_keys.stride() == new_values.stride() and new_keys.stride(-1) == 1
        if not alike or new_keys.dtype != self._dtype or new_values.dtype != self._dtype:
            return False
        self._library.keep_step(self, keys, values, new_keys, new_values)
        return True

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int) -> Tensor | None:
        if q.stride(-1) != 1 or q.dtype != self._dtype or not enabled("cached_attention"):
            return None
        return self._library.attend_step(self, q, keys, values, scaling, window)


class CpuLayers(Layers):
    """See `core.WholeLayers`."""

    def __init__(self, library: Library, layers: Sequence[LayerWeights]) -> None:
        super().__init__([cast("Layer", each) for each in layers])
        self._library = library

    def encoder(self, x: Tensor, spans: AdapterSpans | None, rows: Sequence[tuple[AttentionRows, Prefixes]]) -> Tensor:
        return self._library.encoder_layers(self, x, spans, rows)

    def decoder(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        spans: AdapterSpans | None,
        parts: Sequence[Sequence[tuple[KVStep, Tensor, Tensor]]],
    ) -> Tensor:
        own = [[(kept, k, v) for kept, k, v in each if isinstance(kept, CpuKVStep)] for each in parts]
        return self._library.decoder_layers(self, x, cos, sin, spans, own)


def _dropout_arguments(lora: Lora) -> DropoutArguments:
    return NO_DROPOUT if lora.mask is None else lora.mask.dropped


def _of_prefixes(all_rows: Tensor, prefixes: Prefixes) -> Iterator[Tensor]:
    """The gradient of each prefix, summed over its rows. all_rows: (B, 2, H_kv, P, D) with P of the longest prefix."""
    for number, pair in enumerate(prefixes.pairs):
        rows = [row for row, own in enumerate(prefixes.of_row) if own == number]
        for side, each in enumerate(pair):
            total = torch.zeros(each.shape)
            for row in rows:
                total += all_rows[row, side, :, : each.shape[1]]
            yield total.to(each.dtype)


@functools.cache
def ops_of(library: Library, dtype: torch.dtype) -> CpuOps:
    """The operations by a library, for a dtype."""
    return CpuOps(library, dtype)
