"""Attention of unpadded rows on a GPU: all rows in one launch, forward and backward, no mask, no scores.

FlashAttention takes rows of different lengths by where each begins. The keys of a row may be more than its queries: a
prefix is copied before its row's own keys, and a causal row's last query sees all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from turret.adapters.autograd import FunctionContext, Gradients, apply
from turret.adapters.batch_context import BatchContext
from turret.families import Site
from turret.ops.gpu import usable

WIDEST = 256  # numbers in a head that FlashAttention takes


class RowEdges(NamedTuple):
    """Where each row of a batch is among the queries and among the packed keys, as `gpu_kernels` takes it.

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

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int, bool, int]:
        return self[:6]


class _RowsContext(FunctionContext, Protocol):
    edges: RowEdges
    scaling: float


class _Rows(torch.autograd.Function):
    """q: (N, H, D); k, v: (M, H_kv, D) -> (N, H, D). One number a query is saved instead of its scores."""

    @staticmethod
    def forward(ctx: _RowsContext, q: Tensor, k: Tensor, v: Tensor, edges: RowEdges, scaling: float) -> Tensor:
        y, log_sum = torch.ops.turret.attention(q, k, v, *edges.arguments, scaling)
        ctx.edges, ctx.scaling = edges, scaling
        ctx.save_for_backward(q, k, v, y, log_sum)
        output: Tensor = y
        return output

    @staticmethod
    def backward(ctx: _RowsContext, *gradients: Tensor) -> Gradients:
        inputs, dy = ctx.saved_tensors, gradients[0].contiguous()
        dq, dk, dv = torch.ops.turret.attention_backward(dy, *inputs, *ctx.edges.arguments, ctx.scaling)
        return dq, dk, dv, None, None


def attend_rows(
    context: BatchContext,
    site: Site,
    prefixes: Mapping[int, tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int | None,
) -> Tensor | None:
    """Attention of each row to its own prefix and keys, or None if the programs do not compute it.

    Args:
        context: the batch.
        site: of the attention module.
        prefixes: keys and values (H_kv, P, D) of every slot in the batch that has a prefix here.
        q: (1, H, N, D).
        k: (1, H_kv, M, D).
        v: the same.
        scaling: of the scores.
        window: |key - query| below it is visible; None for no window.

    Returns:
        (1, H, N, D).
    """
    hides = bool(prefixes) and window is not None and site.group != "cross"  # a window would hide the prefix
    if hides or not takes_heads(q.shape[3]) or not usable(q, k, v):
        return None
    edges = row_edges(context, site, window, {slot: pair[0].shape[1] for slot, pair in prefixes.items()}, q.device)
    queries, keys, values = (each[0].transpose(0, 1) for each in (q, k, v))  # (N, H, D)
    if edges.order is not None:
        keys = _packed(keys, [pair[0] for pair in prefixes.values()], edges.order)
        values = _packed(values, [pair[1] for pair in prefixes.values()], edges.order)
    y = apply(_Rows, queries.contiguous(), keys.contiguous(), values.contiguous(), edges, scaling)
    return y.transpose(0, 1)[None]


def takes_heads(size: int) -> bool:
    """Whether FlashAttention takes heads of so many numbers."""
    return size % 8 == 0 and size <= WIDEST


def decodes_heads(size: int) -> bool:
    """Whether the program of a decoding step takes heads of so many numbers: powers of two, for its matrix units."""
    return 32 <= size <= WIDEST and size & (size - 1) == 0


def _packed(keys: Tensor, prefixes: Sequence[Tensor], order: Tensor) -> Tensor:
    """Every row's prefix before its own keys. keys: (M, H_kv, D); prefixes: (H_kv, P, D) each."""
    return torch.cat([*(each.to(keys.dtype).transpose(0, 1) for each in prefixes), keys]).index_select(0, order)


def row_edges(
    context: BatchContext, site: Site, window: int | None, prefixes: Mapping[int, int], device: torch.device
) -> RowEdges:
    """The edges of this batch's rows: copied to the GPU once for all layers of a group.

    prefixes: P of every slot that has a prefix at this site.
    """
    key = ("edges", site.group, window, tuple(prefixes.items()))
    if key not in context.memo:
        cross = site.group == "cross"
        queries = context.spans("encoder" if site.group == "encoder" else "decoder")
        keys = context.spans("encoder") if cross else queries
        before = dict(zip(prefixes, accumulate((0, *prefixes.values())), strict=False))  # where each prefix begins
        own = sum(prefixes.values())  # where the rows' own keys begin
        order: list[int] = []
        counts = []
        for row, (start, end) in enumerate(keys):
            slot = context.slot_of(row)
            P = prefixes.get(slot, 0)
            if prefixes:
                order += [*range(before.get(slot, 0), before.get(slot, 0) + P), *range(own + start, own + end)]
            counts.append(P + end - start)
        lengths = [end - start for start, end in queries]
        context.memo[key] = RowEdges(
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device),
            max(lengths),
            max(counts),
            site.causal and not cross,
            0 if window is None or cross else window,
            torch.tensor(order, device=device) if prefixes else None,
        )
    edges: RowEdges = context.memo[key]
    return edges
