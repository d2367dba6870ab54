"""Attention over all rows of an unpadded batch in one kernel, without saving probabilities (Dao et al. 2022). CPU only.

    P = softmax(scaling q k^T + bias),   y = dropout(P) v

Saved for the backward pass are q, k, v, which exist anyway, and the log-sum-exp of each query's scores. Scores are
computed again, some queries at a time, while they are in a core's cache. No row is padded, and each row has its own
prefix. The reference is `attention._unpadded_plainly`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from turret.adapters.autograd import Gradients, KernelContext, apply
from turret.ops.cpu import AttentionRows, DropoutArguments, Library, Prefixes


class _FlashContext(KernelContext, Protocol):
    rows: AttentionRows
    of_row: tuple[int | None, ...]
    dropped: DropoutArguments


class _Flash(torch.autograd.Function):
    """q: (1, H, N, D); k, v: (1, H_kv, M, D); prefixes: key and value (H_kv, P, D) of each pair, one after another."""

    @staticmethod
    def forward(
        ctx: _FlashContext,
        library: Library,
        rows: AttentionRows,
        of_row: tuple[int | None, ...],
        dropped: DropoutArguments,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *prefixes: Tensor,
    ) -> Tensor:
        ctx.library, ctx.rows, ctx.of_row, ctx.dropped = library, rows, of_row, dropped
        pairs = pairs_of(prefixes, of_row)
        y, log_sum = library.attention(rows, _tokens(q), _tokens(k), _tokens(v), pairs, dropped)
        ctx.save_for_backward(q, k, v, log_sum, *prefixes)
        return y

    @staticmethod
    def backward(ctx: _FlashContext, *gradients: Tensor) -> Gradients:
        saved, dy = ctx.saved_tensors, gradients[0].contiguous()  # a checkpoint lets them be read only once
        q, k, v = map(_tokens, saved[:3])
        log_sum, prefixes = saved[3], saved[4:]
        *parts, all_rows = ctx.library.attention_backward(
            ctx.rows, q, k, v, pairs_of(prefixes, ctx.of_row), ctx.dropped, dy, log_sum
        )
        back = [each.transpose(0, 1)[None] for each in parts]
        return None, None, None, None, *back, *prefix_gradients(all_rows, prefixes, ctx.of_row)


def flash(
    library: Library,
    rows: AttentionRows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Prefixes,
    dropped: DropoutArguments,
) -> Tensor:
    """Attention of each row to its own prefix and keys. q: (1, H, N, D); k, v: (1, H_kv, M, D) -> (1, H, N, D)."""
    flat, of_row = [each for pair in prefixes.pairs for each in pair], tuple(prefixes.of_row)
    if torch.is_grad_enabled():
        y = apply(_Flash, library, rows, of_row, dropped, q, k, v, *flat)
    else:
        y, _ = library.attention(rows, _tokens(q), _tokens(k), _tokens(v), pairs_of(flat, of_row), dropped)
    return y.transpose(0, 1)[None]


def prefix_gradients(all_rows: Tensor, prefixes: Sequence[Tensor], of_row: tuple[int | None, ...]) -> Iterator[Tensor]:
    """The gradient of each prefix, summed over its rows. all_rows: (B, 2, H_kv, P, D) with P of the longest prefix."""
    sums = [torch.zeros(each.shape) for each in prefixes]
    for row, pair in enumerate(of_row):
        if pair is not None:
            P = prefixes[2 * pair].shape[1]
            for side in (0, 1):
                sums[2 * pair + side] += all_rows[row, side, :, :P]
    return (s.to(p.dtype) for s, p in zip(sums, prefixes, strict=True))


def _tokens(x: Tensor) -> Tensor:
    """(1, H, N, D) -> (N, H, D) with a contiguous last axis."""
    tokens = x[0].transpose(0, 1)
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def pairs_of(flat: Sequence[Tensor], of_row: tuple[int | None, ...]) -> Prefixes:
    """Prefixes as the kernels take them. flat: key and value of each pair, one after another."""
    return Prefixes([(flat[i].contiguous(), flat[i + 1].contiguous()) for i in range(0, len(flat), 2)], of_row)
