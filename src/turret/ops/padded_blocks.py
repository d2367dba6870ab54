"""Unpadded rows as a few padded blocks and back, so that attention over many rows is a few large products.

Rows of similar length share a block. Padding exists inside attention only: a bias hides it, and no gradient leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from turret.ops.core import FunctionContext, Gradients, apply, copied, enabled

SHORTER = 0.5  # a row shorter than this share of its block's longest row begins another block,
SMALL = 1 << 13  # unless the block has at most so many scores per head
LARGE = 1 << 18  # scores per head of one block; they fit a processor's cache, and the next row begins another block

STEPS = ((64, 8), (256, 16), (1 << 62, 32))  # a block's longest is rounded up: by 8 to 64, by 16 to 256, then by 32

Span = tuple[int, int]  # (start, end) among the unpadded tokens


def rounded(size: int, steps: Sequence[tuple[int, int]]) -> int:
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
        longest = rounded(max(lengths), STEPS)
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
            copied(places.flatten(), device),
            copied(back, device),
            copied(places[inside], device),
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
            tokens = apply(_Place, tokens, self.places, self.back, self.tokens)
        return tokens.reshape(rows, self.longest, *tokens.shape[1:]).transpose(1, 2)

    def unblock(self, x: Tensor) -> Tensor:
        """The block's own tokens, row after row: (B, H, T, D) -> (n, H, D)."""
        tokens = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])  # (B * T, H, D)
        return apply(_Select, tokens, self.back) if self.padded else tokens


class _PlaceContext(FunctionContext, Protocol):
    size: int


class _Place(torch.autograd.Function):
    """Tokens (N, H, D) -> places (B * T, H, D). The gradient of a padding place is dropped."""

    @staticmethod
    def forward(ctx: _PlaceContext, x: Tensor, places: Tensor, back: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(back, tokens)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: _PlaceContext, *gradients: Tensor) -> Gradients:
        back, tokens = ctx.saved_tensors
        own = gradients[0].index_select(0, back)
        whole = own.new_zeros(ctx.size, *own.shape[1:]).index_copy_(0, tokens, own)
        return whole, None, None, None


class _Select(torch.autograd.Function):
    """x[index] with distinct indices: its gradient is a copy, not a sum."""

    @staticmethod
    def forward(ctx: _PlaceContext, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: _PlaceContext, *gradients: Tensor) -> Gradients:
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
            tokens = apply(_Select, tokens, self.order)
        return tokens.transpose(0, 1)[None]


def _groups(queries: Sequence[Span], keys: Sequence[Span], kinds: Sequence[int]) -> list[list[int]]:
    """The rows of each block, longest first; rows of equal length stay in their order."""
    sizes = [(q[1] - q[0], k[1] - k[0]) for q, k in zip(queries, keys, strict=True)]
    groups: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda row: (kinds[row], -sum(sizes[row]), row)):
        if groups and kinds[groups[-1][0]] == kinds[row] and enabled("blocks"):
            group = groups[-1]
            t, s = (max(sizes[each][side] for each in (*group, row)) for side in (0, 1))
            area = (len(group) + 1) * t * s
            similar = sum(sizes[row]) >= SHORTER * sum(sizes[group[0]])
            if area <= SMALL or (similar and area <= LARGE):
                group.append(row)
                continue
        groups.append([row])
    return groups
