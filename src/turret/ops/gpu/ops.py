"""The operations of a GPU: each is one launch, of a program in Triton or of torch's fused attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from turret.ops.core import Cached, Gradients, Loras, Ops
from turret.ops.structs import (
    GRADIENT_STAYS,
    AttentionRows,
    DropoutArguments,
    Lora,
    Prefixes,
    RMSNorm,
)

WIDEST = 256  # numbers in a head that FlashAttention takes
MOST = 3  # LoRAs that one launch adds


class RowEdges(NamedTuple):
    """Where each row of a batch is among the queries and among the packed keys.

    starts, key_starts: (B + 1,) int32. order: (M,) int64, each packed key among all prefixes and then all keys; None if
    no row has a prefix.
    """

    starts: Tensor
    key_starts: Tensor
    most: int
    most_keys: int
    causal: bool
    window: int
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
                torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=device),
                torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device),
                max(queries),
                max(counts),
                rows.causal,
                rows.window,
                torch.tensor(order, device=device) if sizes else None,
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
    def arguments(self) -> tuple[Tensor, Tensor, int, int, bool, int]:
        return self[:6]


class GpuOps(Ops):
    """By the programs of `turret.ops.gpu`; on another device than a GPU these are their formulas in torch."""

    kernels = True
    layouts = frozenset({"pre-norm"})
    recorded = output_read = True

    # --- LoRA ---------------------------------------------------------------------------------------------------------

    def takes_lora(self, loras: Loras) -> bool:
        """At most three, of one rank, scaling and dropout."""
        own = [each for each in loras if each is not None]
        kinds = {(len(each.A), each.scaling, each.p) for each in own}
        factors = [each for lora in own for each in (lora.A, lora.B)]
        plain = all(each.dtype == torch.float32 and each.is_contiguous() for each in factors)
        return plain and len(kinds) < 2 and len(own) <= MOST

    def add_lora(self, y: Sequence[Tensor], x: Tensor, loras: Loras, plus: Tensor | None = None) -> list[Tensor]:
        """In one launch; h is one tensor (N, G R)."""
        places = [place for place, each in enumerate(loras) if each is not None]
        if plus is not None:
            for place in set(range(len(y))) - set(places):
                y[place].add_(plus)
        if not places:
            return []
        own = [each for each in loras if each is not None]
        A, B = [each.A for each in own], [each.B for each in own]
        return [torch.ops.turret.add_lora([y[place] for place in places], x, A, B, plus, *_settings(own))]

    def lora_backward(
        self, loras: Loras, x: Callable[[], Tensor], inner: Sequence[Tensor], dy: Sequence[Tensor], dx: Tensor | None
    ) -> Gradients:
        """In two launches."""
        places = [place for place, each in enumerate(loras) if each is not None]
        if not places:
            return []
        own, (h,) = [each for each in loras if each is not None], inner
        A, B, own_dy = [each.A for each in own], [each.B for each in own], [dy[place] for place in places]
        into = dy[0].new_zeros(len(dy[0]), A[0].shape[1]) if dx is None else dx
        dh = torch.ops.turret.lora_input_gradient(into, own_dy, A, B, *_settings(own))
        targets = [_target(each) for pair in zip(A, B, strict=True) for each in pair]
        sums = [target for target, _ in targets]
        torch.ops.turret.lora_factor_gradients(sums[::2], sums[1::2], x(), h, dh, own_dy, *_settings(own))
        return [None if stays else target for target, stays in targets]

    # --- norms, activations, positions --------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor | None]:
        y: Tensor = torch.ops.turret.rms_norm(x.reshape(-1, x.shape[-1]), *norm)
        return y.view(x.shape), None

    def rms_norm_backward(
        self, x: Tensor, norm: RMSNorm, r: Tensor | None, dy: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        """r is computed again."""
        rows, own = (each.reshape(-1, x.shape[-1]) for each in (x, dy))
        dx: Tensor = torch.ops.turret.rms_norm_backward(rows, *norm, own, plus)
        return dx.view(x.shape)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        y: Tensor = torch.ops.turret.swiglu(gate, up)
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup, _ = torch.ops.turret.swiglu_backward(gate, up, dy)
        return dgate, dup

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """In place."""
        torch.ops.turret.rotate(q, k, cos, sin, sign)
        return q, k

    # --- attention ----------------------------------------------------------------------------------------------------

    def takes_attention(
        self, dim: int, *, p: float, biased: bool, window: bool, prefixed: bool, all_asked: bool
    ) -> bool:
        """No dropout, no bias, no window that would hide a prefix."""
        fits = self.attends and dim % 8 == 0 and dim <= WIDEST
        return fits and p == 0.0 and not biased and not (window and prefixed) and all_asked

    def attention(
        self, rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor]:
        edges = RowEdges.of(rows, prefixes, q.device)
        keys, values = (edges.packed(each, own) for each, own in zip((k, v), _sides(prefixes), strict=True))
        y, log_sum = torch.ops.turret.attention(q.contiguous(), keys, values, *edges.arguments, rows.scaling)
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
        dq, dkeys, dvalues = torch.ops.turret.attention_backward(
            dy, q.contiguous(), keys, values, y, log_sum, *edges.arguments, rows.scaling
        )
        dk, of_keys = edges.unpacked(dkeys, k, sides[0])
        dv, of_values = edges.unpacked(dvalues, v, sides[1])
        return dq, dk, dv, [each for pair in zip(of_keys, of_values, strict=True) for each in pair]

    def takes_new_token(self, dim: int) -> bool:
        """Powers of two, for its matrix units."""
        return 32 <= dim <= WIDEST and dim & (dim - 1) == 0

    def attend_new_token(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cached: Cached, window: int, scaling: float
    ) -> Tensor:
        y: Tensor = torch.ops.turret.attend_step(q, k, v, cos, sin, *cached, window, scaling)
        return y


def _sides(prefixes: Prefixes) -> tuple[list[Tensor], list[Tensor]]:
    """The keys and the values of all prefixes."""
    return [key for key, _ in prefixes.pairs], [value for _, value in prefixes.pairs]


def _settings(loras: Sequence[Lora]) -> tuple[float, Tensor | None, int, int]:
    """(scale, and of dropout the keys, first seed and threshold) of LoRAs that are alike, at consecutive sites."""
    first = loras[0]
    if first.mask is None:
        return first.scaling, None, 0, 0
    dropped = first.mask.dropped
    return first.scale, dropped.keys, (dropped.seed ^ 1 << 31) - (1 << 31), dropped.threshold


def _target(parameter: Tensor) -> tuple[Tensor, bool]:
    """Where a gradient is added up, and whether that is the parameter's own `grad`."""
    if getattr(parameter, GRADIENT_STAYS, False) and (grad := parameter.grad) is not None:
        return grad, True
    return torch.zeros_like(parameter, requires_grad=False), False
