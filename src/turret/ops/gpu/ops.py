"""The operations of a GPU: cuBLAS for all products, torch's FlashAttention, and one launch for each small operation.

What it buys over the libraries' own modules: a layer saves less, LoRA of layers with one input shares a product, rows
need no padding, and a row's prefix needs no mask.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from turret.ops.core import Gradients, Loras, Ops, copied
from turret.ops.structs import GRADIENT_STAYS, AttentionRows, DropoutArguments, Lora, Prefixes, RMSNorm

ATTENTION, LIGER, DROPOUT = FEATURES = ("attention", "liger", "dropout")  # what a GPU may have
WIDEST = 256  # numbers in a head that FlashAttention takes


class RowEdges(NamedTuple):
    """Where each row of a batch is among the queries and among the packed keys.

    starts, key_starts: (B + 1,) int32. order: (M,) int64, each packed key among all prefixes and then all keys; None if
    no row has a prefix.
    """

    starts: Tensor
    key_starts: Tensor
    most: int
    most_keys: int
    order: Tensor | None = None

    @classmethod
    def of(cls, rows: AttentionRows, prefixes: Prefixes, device: torch.device) -> RowEdges:
        """The edges of a batch, copied to the GPU once for all layers of a group."""
        sizes = [key.shape[1] for key, _ in prefixes.pairs]
        key = (device, tuple(sizes), tuple(prefixes.of_row))
        if key not in rows.memo:
            queries, keys, starts = (each.tolist() for each in (rows.query_lengths, rows.key_lengths, rows.key_starts))
            before, own = [0, *accumulate(sizes)], sum(sizes)  # where each prefix begins; where the rows' own keys do
            order: list[int] = []
            counts = []
            for pair, start, count in zip(prefixes.of_row, starts, keys, strict=True):
                P = 0 if pair is None else sizes[pair]
                if pair is not None:
                    order += range(before[pair], before[pair] + P)
                order += range(own + start, own + start + count)
                counts.append(P + count)
            rows.memo[key] = cls(
                copied(torch.tensor([0, *accumulate(queries)], dtype=torch.int32), device),
                copied(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), device),
                max(queries),
                max(counts),
                copied(torch.tensor(order), device) if sizes else None,
            )
        edges: RowEdges = rows.memo[key]
        return edges

    def packed(self, keys: Tensor, prefixes: Sequence[Tensor]) -> Tensor:
        """Every row's prefix before its own keys. keys: (M, H_kv, D); prefixes: (H_kv, P, D) each."""
        if self.order is None:
            return keys.contiguous()
        every = [*(each.to(keys.dtype).transpose(0, 1) for each in prefixes), keys]
        return torch.cat(every).index_select(0, self.order)

    def unpacked(self, gradient: Tensor, keys: Tensor, prefixes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the keys, and of each prefix, which several rows may share."""
        if self.order is None:
            return gradient, []
        sizes = [each.shape[1] for each in prefixes]
        whole = gradient.new_zeros(sum(sizes) + len(keys), *gradient.shape[1:]).index_add_(0, self.order, gradient)
        *parts, own = torch.split(whole, [*sizes, len(keys)])
        return own, [part.transpose(0, 1).to(each.dtype) for part, each in zip(parts, prefixes, strict=True)]

    @property
    def sizes(self) -> tuple[Tensor, Tensor, int, int]:
        return self[:4]


class GpuOps(Ops):
    """By the features that a GPU has (`available.features`); torch's plain operations compute the rest.

    Args:
        features: some of `FEATURES`.
    """

    kernels = True
    layouts = frozenset({"pre-norm"})
    output_read = True

    def __init__(self, features: frozenset[str]) -> None:
        self.features = features

    def _liger(self, x: Tensor) -> ModuleType | None:
        """liger-kernel's programs, if they compute x."""
        return _module("liger") if LIGER in self.features and x.numel() else None

    # --- LoRA ---------------------------------------------------------------------------------------------------------

    def add_lora(self, y: Sequence[Tensor], x: Tensor, loras: Loras, plus: Tensor | None = None) -> list[Tensor]:
        """Layers with one input share a product: h = x [A_1; A_2; ...]^T, unless each has a mask of its own."""
        own = [(out, lora) for out, lora in zip(y, loras, strict=True) if lora is not None]
        if plus is not None:
            for out in y:
                out.add_(plus)
        if not own:
            return []
        every = _stacked([lora for _, lora in own], x.dtype)
        if _masked(loras):
            factors = _parts(every.mT, loras)
            inner = [_dropped(x, lora) @ A for (_, lora), A in zip(own, factors, strict=True)]  # (N, R) each
        else:
            inner = [x @ every.mT]  # (N, G R)
        for (out, lora), part in zip(own, _hidden(inner, loras), strict=True):
            out.addmm_(part, lora.B.to(x.dtype).mT, alpha=lora.scale)
        return inner

    def lora_backward(
        self, loras: Loras, x: Callable[[], Tensor], inner: Sequence[Tensor], dy: Sequence[Tensor], dx: Tensor | None
    ) -> Gradients:
        """Gradients are added in the precision of the parameters where these keep them."""
        own = [(d, lora) for d, lora in zip(dy, loras, strict=True) if lora is not None]
        if not own:
            return []
        given, every = x(), _stacked([lora for _, lora in own], own[0][0].dtype)
        dh = every.new_empty(len(given), len(every))  # (N, G R)
        parts = _parts(dh, loras)
        for part, (d, lora) in zip(parts, own, strict=True):
            part.addmm_(d, lora.B.to(d.dtype), beta=0.0, alpha=lora.scale)
        if not _masked(loras):
            if dx is not None:
                dx.addmm_(dh, every)
            of_A = torch.split(dh.mT @ given, [len(lora.A) for _, lora in own])
        else:
            for (_, lora), part, A in zip(own, parts, _parts(every.mT, loras), strict=True):
                if dx is not None:
                    dx.add_(_dropped(part @ A.mT, lora))
            of_A = tuple(part.mT @ _dropped(given, lora) for (_, lora), part in zip(own, parts, strict=True))
        found: Gradients = []
        for (d, lora), h, gradient in zip(own, _hidden(inner, loras), of_A, strict=True):
            found += [_added(lora.A, gradient, 1.0), _added(lora.B, d.mT @ h, lora.scale)]
        return found

    # --- norms, activations, positions, dropout -----------------------------------------------------------------------

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor | None]:
        if (liger := self._liger(x)) is None:
            return super().rms_norm(x, norm)
        found: tuple[Tensor, Tensor] = liger.rms_norm(x.contiguous(), *norm)
        return found

    def rms_norm_backward(
        self, x: Tensor, norm: RMSNorm, r: Tensor | None, dy: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        if (liger := self._liger(x)) is None:
            return super().rms_norm_backward(x, norm, r, dy, plus)
        dx: Tensor = liger.rms_norm_backward(x.contiguous(), norm.weight, r, dy.contiguous())
        return dx if plus is None else dx.add_(plus)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        if (liger := self._liger(gate)) is None:
            return super().swiglu(gate, up)
        y: Tensor = liger.swiglu(gate, up)
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        if (liger := self._liger(gate)) is None:
            return super().swiglu_backward(gate, up, dy)
        found: tuple[Tensor, Tensor] = liger.swiglu_backward(gate, up, dy.contiguous())
        increment_version(
            [gate, up]
        )  # written to: a second backward pass of the same graph is an error, not a wrong sum
        return found

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        if (liger := self._liger(q)) is None:
            return super().rotate(q, k, cos, sin, sign)
        found: tuple[Tensor, Tensor] = liger.rotate(q, k, cos, sin, sign)
        return found

    def dropout(self, x: Tensor, dropped: DropoutArguments, scale: float) -> Tensor:
        keys = dropped.keys
        if DROPOUT not in self.features or keys is None or not x.numel() or keys.numel() * x.shape[-1] != x.numel():
            return super().dropout(x, dropped, scale)
        rows = x.contiguous().view(-1, x.shape[-1])
        y: Tensor = _module("programs").dropout(rows, keys.flatten(), dropped.seed, dropped.threshold, scale)
        return y.view(x.shape)

    # --- attention ----------------------------------------------------------------------------------------------------

    def takes_attention(
        self, dim: int, *, p: float, biased: bool, window: bool, prefixed: bool, all_asked: bool
    ) -> bool:
        """No dropout, no bias, no window that would hide a prefix."""
        fits = self.attends and ATTENTION in self.features and dim % 8 == 0 and dim <= WIDEST
        return fits and p == 0.0 and not biased and not (window and prefixed) and all_asked

    def attention(
        self, rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor]:
        if q.is_meta:  # a plan
            return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        edges = RowEdges.of(rows, prefixes, q.device)
        keys, values = (edges.packed(each, own) for each, own in zip((k, v), _sides(prefixes), strict=True))
        y, log_sum, *_ = torch.ops.aten._flash_attention_forward(
            q.contiguous(), keys, values, *edges.sizes, 0.0, rows.causal, False, scale=rows.scaling, **_window(rows)
        )
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
        edges, sides = RowEdges.of(rows, prefixes, q.device), _sides(prefixes)
        keys, values = (edges.packed(each, own) for each, own in zip((k, v), sides, strict=True))
        none = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # of dropout
        settings = (0.0, rows.causal, *none)
        dq, dkeys, dvalues = torch.ops.aten._flash_attention_backward(
            dy, q.contiguous(), keys, values, y, log_sum, *edges.sizes, *settings, scale=rows.scaling, **_window(rows)
        )
        dk, of_keys = edges.unpacked(dkeys, k, sides[0])
        dv, of_values = edges.unpacked(dvalues, v, sides[1])
        return dq, dk, dv, [each for pair in zip(of_keys, of_values, strict=True) for each in pair]


def _sides(prefixes: Prefixes) -> tuple[list[Tensor], list[Tensor]]:
    """The keys and the values of all prefixes."""
    return [key for key, _ in prefixes.pairs], [value for _, value in prefixes.pairs]


def _window(rows: AttentionRows) -> dict[str, int]:
    if not rows.window:
        return {}
    return {"window_size_left": rows.window - 1, "window_size_right": 0 if rows.causal else rows.window - 1}


@functools.cache
def _module(name: str) -> ModuleType:
    """A module that needs Triton: a machine without a GPU never loads it."""
    return importlib.import_module(f"turret.ops.gpu.{name}")


def _masked(loras: Loras) -> bool:
    return any(lora is not None and lora.mask is not None for lora in loras)


def _stacked(loras: Sequence[Lora], dtype: torch.dtype) -> Tensor:
    """The A of all, (G R, D_in)."""
    return (loras[0].A if len(loras) == 1 else torch.cat([lora.A for lora in loras])).to(dtype)


def _dropped(x: Tensor, lora: Lora) -> Tensor:
    return x if lora.mask is None else lora.mask.of(x)


def _hidden(inner: Sequence[Tensor], loras: Loras) -> Sequence[Tensor]:
    """h (N, R) of each LoRA, as `add_lora` returned it."""
    return inner if _masked(loras) else _parts(inner[0], loras)


def _parts(h: Tensor, loras: Loras) -> tuple[Tensor, ...]:
    """(..., R) of each LoRA."""
    return torch.split(h, [len(lora.A) for lora in loras if lora is not None], dim=1)


def _added(parameter: Tensor, gradient: Tensor, scale: float) -> Tensor | None:
    """Add a gradient where the parameter keeps it, else return it in the parameter's precision."""
    if getattr(parameter, GRADIENT_STAYS, False) and (kept := parameter.grad) is not None:
        kept.add_(gradient, alpha=scale)
        return None
    gradient = gradient.to(parameter.dtype)
    return gradient if scale == 1.0 else gradient.mul_(scale)
