"""Attention as numbers: softmax(cap(scaling q k^T) + bias) v with dropout, the plain way and the fast one.

cap(s) = softcap tanh(s / softcap), where a base caps its scores (Gemma 2, 2024).
Knows tensors, not modules, rows of a batch or prefixes. On the CPU, short rows and dropout make torch's
fused kernel slower than the products written out; these keep one matrix a layer for the backward pass, the
probabilities before dropout, and no copy of grouped keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters.fused import enabled
from turret.adapters.fused.dropout import Masks, dropout, kept_share, masked

LARGEST = 1 << 25  # probabilities of one call; from here on torch's fused kernel, which keeps none of them


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float = 0.0,
    masks: Masks | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(cap(scaling * q k^T) + bias) v, with dropout at rate p on the probabilities.

    q: (B, H, T, D); k, v: (B, H_kv, S, D) with H a multiple of H_kv; bias: broadcasts to (B, H, T, S). -> (B, H, T, D)
    """
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= LARGEST
    known = softcap is None and (bias is None or not bias.requires_grad)
    if q.device.type == "cpu" and trains and small and known and enabled("attention_gradient"):
        mask = None
        if p > 0.0:
            mask = (masks or Masks()).like(q.new_empty(()).expand(*q.shape[:3], k.shape[2]), p)
        output: Tensor = _Attention.apply(q, k, v, bias, scaling, kept_share(p), mask)  # type: ignore[no-untyped-call]
        return output
    return attend_plainly(q, k, v, bias, scaling, p, softcap)


def attend_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The same in torch's own operations: the reference of the fast way, and the way of every other device."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    if softcap is None and (p == 0.0 or q.device.type == "cuda"):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling, dropout_p=p)
    scores = (q * scaling) @ k.mT  # (B, H, T, S); with dropout the fused kernel is slower than this
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    return dropout(scores.softmax(dim=-1), p) @ v


class _Attention(torch.autograd.Function):
    """P = softmax(scaling q k^T + bias);  y = (P mask / kept) v. Grouped queries lie behind one another: G T rows.

    dV = (P mask)^T dy / kept;  dP = (dy v^T) mask / kept;  dS = P (dP - sum(dP P));
    dq = scaling dS k;  dk = scaling dS^T q.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaling: float, kept: float, mask: Tensor | None
    ) -> Tensor:
        B, H, T, D = q.shape
        heads, S = k.shape[1], k.shape[2]
        queries = (q * scaling).reshape(B * heads, -1, D)  # (B H_kv, G T, D)
        keys = k.reshape(B * heads, S, D)
        values = v.reshape(B * heads, S, D)
        if mask is not None:
            values = values * (1.0 / kept)
        scores = torch.bmm(queries, keys.mT)  # (B H_kv, G T, S)
        if bias is not None:
            scores.view(B, H, T, S).add_(bias)
        probabilities = torch.softmax(scores, dim=-1)
        dropped = probabilities
        if mask is not None:
            mask = mask.view(scores.shape)
            dropped = masked(probabilities, mask)
        ctx.save_for_backward(queries, keys, values, probabilities, mask)
        ctx.scaling, ctx.kept, ctx.shapes = scaling, kept, (q.shape, k.shape)
        return torch.bmm(dropped, values).view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        queries, keys, values, probabilities, mask = ctx.saved_tensors
        shape, keys_shape = ctx.shapes
        dy = gradients[0].reshape(queries.shape)
        dP = torch.bmm(dy, values.mT)
        dropped = probabilities
        if mask is not None:
            dP.view(mask.dtype).bitwise_and_(mask)
            dropped = masked(probabilities, mask)
        dv = torch.bmm(dropped.mT, dy)
        if mask is not None:
            dv.mul_(1.0 / ctx.kept)
        dS = torch._softmax_backward_data(dP, probabilities, -1, dP.dtype)
        dq = torch.bmm(dS, keys).mul_(ctx.scaling)
        dk = torch.bmm(dS.mT, queries)
        return dq.view(shape), dk.view(keys_shape), dv.view(keys_shape), None, None, None, None
