"""The formula of attention, in plain torch and with its own gradient, and attention over the rows of a batch.

    y = dropout(softmax(cap(scaling q k^T) + bias)) v

cap(s) = softcap tanh(s / softcap), if a base caps its scores (Gemma 2, 2024). Dropout needs the products written out.
The faster path saves one matrix per layer, the probabilities before dropout, and copies no grouped keys or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from turret.ops.core import FunctionContext, Gradients, Ops, apply, enabled
from turret.ops.structs import NO_DROPOUT, AttentionRows, DropoutArguments, Prefixes

LARGEST = 1 << 25  # probabilities of one call; above it torch's fused kernel computes, which saves none of them


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropped: DropoutArguments = NO_DROPOUT,
    softcap: float | None = None,
) -> Tensor:
    """softmax(cap(scaling * q k^T) + bias) v, with dropout of the probabilities.

    Args:
        q: (B, H, T, D).
        k: (B, H_kv, S, D), with H a multiple of H_kv.
        v: (B, H_kv, S, D).
        bias: broadcasts to (B, H, T, S).
        scaling: of the scores.
        dropped: the mask, with a key for each query (B, T).
        softcap: largest score; None for no cap.

    Returns:
        (B, H, T, D).

    Source: Vaswani et al. 2017, "Attention Is All You Need"; grouped keys and values: Ainslie et al. 2023.
    """
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= LARGEST
    known = softcap is None and (bias is None or not bias.requires_grad)
    if q.device.type == "cpu" and trains and small and known and enabled("attention_gradient"):
        return apply(_Attention, q, k, v, bias, scaling, dropped)
    return attend_plainly(q, k, v, bias, scaling, dropped, softcap)


def attend_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropped: DropoutArguments = NO_DROPOUT,
    softcap: float | None = None,
) -> Tensor:
    """`attend` in torch's own operations: the reference of every faster path, and the path of every other device."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    if softcap is None and dropped is NO_DROPOUT:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
    scores = (q * scaling) @ k.mT  # (B, H, T, S)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(dim=-1)
    if dropped is NO_DROPOUT:
        return probabilities @ v
    return probabilities * dropped.kept(scores.shape) @ (v * dropped.scale)


class _AttentionContext(FunctionContext, Protocol):
    scaling: float
    dropped: DropoutArguments
    shapes: tuple[torch.Size, torch.Size]


class _Attention(torch.autograd.Function):
    """P = softmax(scaling q k^T + bias);  y = scale (P mask) v. The G groups of queries follow one another: G T rows.

    dV = scale (P mask)^T dy;  dP = scale (dy v^T) mask;  dS = P (dP - sum(dP P));
    dq = scaling dS k;  dk = scaling dS^T q.
    """

    @staticmethod
    def forward(
        ctx: _AttentionContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropped: DropoutArguments,
    ) -> Tensor:
        B, H, T, D = q.shape
        heads, S = k.shape[1], k.shape[2]
        queries = (q * scaling).reshape(B * heads, -1, D)  # (B H_kv, G T, D)
        keys = k.reshape(B * heads, S, D)
        values = v.reshape(B * heads, S, D)
        if dropped.threshold:
            values = values * dropped.scale
        scores = torch.bmm(queries, keys.mT)  # (B H_kv, G T, S)
        if bias is not None:
            scores.view(B, H, T, S).add_(bias)
        probabilities = torch.softmax(scores, dim=-1)
        mask = dropped.kept(torch.Size((B, H, T, S))).view(scores.shape) if dropped.threshold else None
        ctx.save_for_backward(queries, keys, values, probabilities, mask)
        ctx.scaling, ctx.dropped, ctx.shapes = scaling, dropped, (q.shape, k.shape)
        return torch.bmm(probabilities if mask is None else probabilities * mask, values).view(B, H, T, D)

    @staticmethod
    def backward(ctx: _AttentionContext, *gradients: Tensor) -> Gradients:
        queries, keys, values, probabilities, mask = ctx.saved_tensors
        shape, keys_shape = ctx.shapes
        dy = gradients[0].reshape(queries.shape)
        dP = torch.bmm(dy, values.mT)
        if ctx.dropped.threshold:
            dP.mul_(mask)
            dv = torch.bmm((probabilities * mask).mT, dy).mul_(ctx.dropped.scale)
        else:
            dv = torch.bmm(probabilities.mT, dy)
        dS = torch._softmax_backward_data(dP, probabilities, -1, dP.dtype)
        dq = torch.bmm(dS, keys).mul_(ctx.scaling)
        dk = torch.bmm(dS.mT, queries)
        return dq.view(shape), dk.view(keys_shape), dv.view(keys_shape), None, None, None


# --- rows -------------------------------------------------------------------------------------------------------------
# All rows of an unpadded batch in one operation, without saving probabilities (Dao et al. 2022).
#
# Saved for the backward pass are q, k, v, which exist anyway, and the log-sum-exp of each query's scores. No row is
# padded, and each row has its own prefix. The reference is `adapters.attention._unpadded_plainly`.


class _RowsContext(FunctionContext, Protocol):
    ops: Ops
    rows: AttentionRows
    of_row: tuple[int | None, ...]
    dropped: DropoutArguments


class _Rows(torch.autograd.Function):
    """q: (N, H, D); k, v: (M, H_kv, D); prefixes: key and value (H_kv, P, D) of each pair, one after another."""

    @staticmethod
    def forward(
        ctx: _RowsContext,
        ops: Ops,
        rows: AttentionRows,
        of_row: tuple[int | None, ...],
        dropped: DropoutArguments,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *prefixes: Tensor,
    ) -> Tensor:
        y, log_sum = ops.attention(rows, q, k, v, pairs_of(prefixes, of_row), dropped)
        ctx.ops, ctx.rows, ctx.of_row, ctx.dropped = ops, rows, of_row, dropped
        ctx.save_for_backward(q, k, v, y if ops.output_read else None, log_sum, *prefixes)
        return y

    @staticmethod
    def backward(ctx: _RowsContext, *gradients: Tensor) -> Gradients:
        q, k, v, y, log_sum, *prefixes = ctx.saved_tensors  # a checkpoint lets them be read only once
        pairs, dy = pairs_of(prefixes, ctx.of_row), gradients[0].contiguous()
        dq, dk, dv, others = ctx.ops.attention_backward(ctx.rows, q, k, v, pairs, ctx.dropped, y, log_sum, dy)
        return None, None, None, None, dq, dk, dv, *others


def attend_rows(
    ops: Ops,
    rows: AttentionRows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Prefixes,
    dropped: DropoutArguments,
) -> Tensor:
    """Attention of each row to its own prefix and keys. q: (1, H, N, D); k, v: (1, H_kv, M, D) -> (1, H, N, D)."""
    q, k, v = map(_tokens, (q, k, v))
    flat, of_row = [each for pair in prefixes.pairs for each in pair], tuple(prefixes.of_row)
    if torch.is_grad_enabled():
        y = apply(_Rows, ops, rows, of_row, dropped, q, k, v, *flat)
    else:
        y, _ = ops.attention(rows, q, k, v, pairs_of(flat, of_row), dropped)
    return y.transpose(0, 1)[None]


def _tokens(x: Tensor) -> Tensor:
    """(1, H, N, D) -> (N, H, D) with a contiguous last axis."""
    tokens = x[0].transpose(0, 1)
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def pairs_of(flat: Sequence[Tensor], of_row: Sequence[int | None]) -> Prefixes:
    """Prefixes as the operations take them. flat: key and value of each pair, one after another."""
    return Prefixes([(flat[i].contiguous(), flat[i + 1].contiguous()) for i in range(0, len(flat), 2)], of_row)
