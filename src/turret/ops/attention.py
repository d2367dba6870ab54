"""The formula of attention, in plain torch and with its own gradient, and attention over the rows of a batch.

    y = dropout(softmax(cap(scaling q k^T) + bias)) v

cap(s) = softcap tanh(s / softcap), if a base caps its scores (Gemma 2, 2024). Dropout needs the products written out.
The faster path saves one matrix per layer, the probabilities before dropout, and copies no grouped keys or values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from turret.ops.core import FunctionContext, Gradients, Ops, apply_function, is_enabled, to_device
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
    if q.device.type == "cpu" and trains and small and known and is_enabled("attention_gradient"):
        return apply_function(_Attention, q, k, v, bias, scaling, dropped)
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
    return probabilities * dropped.keep_mask(scores.shape) @ (v * dropped.scale)


class _Attention(torch.autograd.Function):
    """P = softmax(scaling q k^T + bias);  y = scale (P mask) v. The G groups of queries follow one another: G T rows.

    dV = scale (P mask)^T dy;  dP = scale (dy v^T) mask;  dS = P (dP - sum(dP P));
    dq = scaling dS k;  dk = scaling dS^T q.
    """

    @staticmethod
    def forward(
        ctx: FunctionContext,
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
        mask = dropped.keep_mask(torch.Size((B, H, T, S))).view(scores.shape) if dropped.threshold else None
        ctx.save_for_backward(queries, keys, values, probabilities, mask)
        ctx.scaling, ctx.dropped, ctx.shapes = scaling, dropped, (q.shape, k.shape)
        return torch.bmm(probabilities if mask is None else probabilities * mask, values).view(B, H, T, D)

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
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


class _Rows(torch.autograd.Function):
    """q: (N, H, D); k, v: (M, H_kv, D); prefixes: key and value (H_kv, P, D) of each pair, one after another."""

    @staticmethod
    def forward(
        ctx: FunctionContext,
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
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
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
        y = apply_function(_Rows, ops, rows, of_row, dropped, q, k, v, *flat)
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


# --- padded blocks ----------------------------------------------------------------------------------------------------
# Unpadded rows as a few padded blocks and back, so that attention over many rows is a few large products.
#
# Rows of similar length share a block. Padding exists inside attention only: a bias hides it, and no gradient leaves
# it.


SHORTER = 0.5  # a row shorter than this share of its block's longest row begins another block,
SMALL = 1 << 13  # unless the block has at most so many scores per head
LARGE = 1 << 18  # scores per head of one block; they fit a processor's cache, and the next row begins another block

STEPS = ((64, 8), (256, 16), (1 << 62, 32))  # a block's longest is rounded up: by 8 to 64, by 16 to 256, then by 32

Span = tuple[int, int]  # (start, end) among the unpadded tokens


def rounded_size(size: int, steps: Sequence[tuple[int, int]]) -> int:
    """`size` rounded up to a multiple; the first (limit, multiple) of `steps` with size <= limit names it.

    The processor's library keeps a plan for every shape it has seen: few shapes take less memory and less planning.
    """
    multiple = next(each for limit, each in steps if size <= limit)
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class BlockSide:
    """The queries or the keys of a block: B rows with places for T tokens each, taken from N tokens in all.

    Args:
        lengths: tokens of each row.
        longest: T.
        places: (B * T,) the token at each place; padding repeats the row's last token.
        back: (n,) the place of each of the block's own n tokens, row after row.
        tokens: (n,) which of the N tokens they are.
        start: where the block begins, if its tokens are consecutive and without padding.
    """

    lengths: tuple[int, ...]
    longest: int
    places: Tensor
    back: Tensor
    tokens: Tensor
    start: int | None

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> BlockSide:
        lengths = tuple(end - start for start, end in spans)
        longest = rounded_size(max(lengths), STEPS)
        starts = torch.tensor([start for start, _ in spans])[:, None]
        sizes = torch.tensor(lengths)[:, None]
        column = torch.arange(longest)[None]
        places = starts + torch.minimum(column, sizes - 1)  # (B, T)
        inside = column < sizes
        back = torch.arange(places.numel()).view(places.shape)[inside]
        consecutive = set(lengths) == {longest} and all(a[1] == b[0] for a, b in pairwise(spans))
        return cls(
            lengths,
            longest,
            to_device(places.flatten(), device),
            to_device(back, device),
            to_device(places[inside], device),
            spans[0][0] if consecutive else None,
        )

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.longest

    def block(self, x: Tensor) -> Tensor:
        """The block's rows: (1, H, N, D) -> (B, H, T, D)."""
        tokens = x.transpose(1, 2)[0]  # (N, H, D)
        rows = len(self.lengths)
        if self.start is not None:
            if rows * self.longest != len(tokens):
                tokens = tokens[self.start : self.start + rows * self.longest]
        else:
            tokens = apply_function(_Place, tokens, self.places, self.back, self.tokens)
        return tokens.reshape(rows, self.longest, *tokens.shape[1:]).transpose(1, 2)

    def unblock(self, x: Tensor) -> Tensor:
        """The block's own tokens, row after row: (B, H, T, D) -> (n, H, D)."""
        tokens = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])  # (B * T, H, D)
        return apply_function(_Select, tokens, self.back) if self.padded else tokens


class _Place(torch.autograd.Function):
    """Tokens (N, H, D) -> places (B * T, H, D). The gradient of a padding place is dropped."""

    @staticmethod
    def forward(ctx: FunctionContext, x: Tensor, places: Tensor, back: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(back, tokens)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        back, tokens = ctx.saved_tensors
        own = gradients[0].index_select(0, back)
        whole = own.new_zeros(ctx.size, *own.shape[1:]).index_copy_(0, tokens, own)
        return whole, None, None, None


class _Select(torch.autograd.Function):
    """x[index] with distinct indices: its gradient is a copy, not a sum."""

    @staticmethod
    def forward(ctx: FunctionContext, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        (index,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.size, *gradients[0].shape[1:]).index_copy_(0, index, gradients[0]), None


@dataclass(frozen=True)
class Block:
    """Rows of one kind, such as those with one prefix, that attention computes together."""

    kind: int
    queries: BlockSide
    keys: BlockSide


@dataclass(frozen=True)
class BlockLayout:
    """All rows of a batch in blocks, and the way back to their order.

    order: (N,) the index of each token among the blocks' own tokens; None if they are in order.
    """

    blocks: tuple[Block, ...]
    order: Tensor | None

    @classmethod
    def of(
        cls, queries: Sequence[Span], keys: Sequence[Span], kinds: Sequence[int], device: torch.device
    ) -> BlockLayout:
        """Args: spans of queries and keys and a kind for each row; rows of different kinds do not share a block."""
        blocks, rows_in_order = [], []
        for rows in _groups(queries, keys, kinds):
            q = BlockSide.of([queries[row] for row in rows], device)
            k = q if keys is queries else BlockSide.of([keys[row] for row in rows], device)
            blocks.append(Block(kinds[rows[0]], q, k))
            rows_in_order += rows
        order = None
        if rows_in_order != sorted(rows_in_order):
            order = torch.argsort(torch.cat([block.queries.tokens for block in blocks]))
        return cls(tuple(blocks), order)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The outputs (n, H, D) of all blocks as one row of tokens: (1, H, N, D)."""
        tokens = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.order is not None:
            tokens = apply_function(_Select, tokens, self.order)
        return tokens.transpose(0, 1)[None]


def _groups(queries: Sequence[Span], keys: Sequence[Span], kinds: Sequence[int]) -> list[list[int]]:
    """The rows of each block, longest first; rows of equal length stay in their order."""
    sizes = [(q[1] - q[0], k[1] - k[0]) for q, k in zip(queries, keys, strict=True)]
    groups: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda row: (kinds[row], -sum(sizes[row]), row)):
        if groups and kinds[groups[-1][0]] == kinds[row] and is_enabled("blocks"):
            group = groups[-1]
            t, s = (max(sizes[each][side] for each in (*group, row)) for side in (0, 1))
            area = (len(group) + 1) * t * s
            similar = sum(sizes[row]) >= SHORTER * sum(sizes[group[0]])
            if area <= SMALL or (similar and area <= LARGE):
                group.append(row)
                continue
        groups.append([row])
    return groups
