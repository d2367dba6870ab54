"""Unpadded rows as a few padded blocks and back, so that attention over many rows is a few large products.

Knows lengths and indices. Refuses to know what attention does with a block. Rows of like length share a block; its
padding exists inside attention only, where a bias hides it and no gradient leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from turret.adapters.fused import enabled

SHORTER = 0.5  # a row shorter than this share of its block's longest begins another block,
SMALL = 1 << 13  # unless the block has no more scores a head than this
LARGE = 1 << 18  # scores a head of one block, at which the next row begins another: what a processor's cache holds

STEPS = ((64, 8), (256, 16), (1 << 62, 32))  # a block's longest is rounded up: to 64 by 8, to 256 by 16, then by 32

Span = tuple[int, int]  # (start, end) among the unpadded tokens


def rounded(size: int, steps: Sequence[tuple[int, int]]) -> int:
    """`size` up to the next multiple that the first fitting (limit, multiple) names.

    The processor's library keeps a plan for every shape it has seen: few shapes are less memory and less planning.
    """
    multiple = next(each for limit, each in steps if size <= limit)
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class BlockSide:
    """The queries' or the keys' side of a block: B rows in places for T tokens each, among N tokens in all.

    places: (B * T,) the token at each place, with a row's last one in place of padding. back: (n,) the place of each of
    the block's own n tokens, row after row. tokens: (n,) which of the N they are.
    """

    lengths: tuple[int, ...]
    longest: int
    places: Tensor
    back: Tensor
    tokens: Tensor
    start: int | None  # where the block begins, if it is a piece of the tokens as they lie, without padding

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
        in_a_piece = set(lengths) == {longest} and all(a[1] == b[0] for a, b in pairwise(spans))
        return cls(
            lengths,
            longest,
            places.flatten().to(device),
            back.to(device),
            places[inside].to(device),
            spans[0][0] if in_a_piece else None,
        )

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.longest

    def block(self, x: Tensor) -> Tensor:
        """(1, H, N, D) of all tokens -> (B, H, T, D) of this block's."""
        tokens = x.transpose(1, 2)[0]  # (N, H, D)
        rows = len(self.lengths)
        if self.start is not None:
            if rows * self.longest != len(tokens):
                tokens = tokens[self.start : self.start + rows * self.longest]
        else:
            tokens = _Placed.apply(tokens, self.places, self.back, self.tokens)  # type: ignore[no-untyped-call]
        return tokens.reshape(rows, self.longest, *tokens.shape[1:]).transpose(1, 2)

    def unblock(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (n, H, D), the block's own tokens, row after row."""
        tokens = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])  # (B * T, H, D)
        if not self.padded:
            return tokens
        own: Tensor = _Picked.apply(tokens, self.back)  # type: ignore[no-untyped-call]
        return own


class _Placed(torch.autograd.Function):
    """Tokens (N, H, D) to places (B * T, H, D). What comes back to a padding place is nobody's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, back: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(back, tokens)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        back, tokens = ctx.saved_tensors
        own = gradients[0].index_select(0, back)
        whole = own.new_zeros(ctx.size, *own.shape[1:]).index_copy_(0, tokens, own)
        return whole, None, None, None


class _Picked(torch.autograd.Function):
    """x[index], where no index comes twice: its gradient is a copy and not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.size, *gradients[0].shape[1:]).index_copy_(0, index, gradients[0]), None


@dataclass(frozen=True)
class Block:
    """Some rows of one kind (of one prefix, say), as attention computes them together."""

    kind: int
    queries: BlockSide
    keys: BlockSide


@dataclass(frozen=True)
class BlockLayout:
    """All rows of a batch in blocks, and the way back to their order."""

    blocks: tuple[Block, ...]
    order: Tensor | None  # (N,) where among the blocks' own tokens each token is; None where they are in order

    @classmethod
    def of(
        cls, queries: Sequence[Span], keys: Sequence[Span], kinds: Sequence[int], device: torch.device
    ) -> BlockLayout:
        """kinds: one a row; rows of different kinds do not share a block."""
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
        """The blocks' outputs (n_b, H, D) as one row of tokens: (1, H, N, D)."""
        tokens = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.order is not None:
            tokens = _Picked.apply(tokens, self.order)  # type: ignore[no-untyped-call]
        return tokens.transpose(0, 1)[None]


def _groups(queries: Sequence[Span], keys: Sequence[Span], kinds: Sequence[int]) -> list[list[int]]:
    """Rows that share a block, longest first; rows of equal length stay in their order."""
    sizes = [(q[1] - q[0], k[1] - k[0]) for q, k in zip(queries, keys, strict=True)]
    groups: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda row: (kinds[row], -sum(sizes[row]), row)):
        if groups and kinds[groups[-1][0]] == kinds[row] and enabled("blocks"):
            group = groups[-1]
            t, s = (max(sizes[each][side] for each in (*group, row)) for side in (0, 1))
            area = (len(group) + 1) * t * s
            like = sum(sizes[row]) >= SHORTER * sum(sizes[group[0]])
            if area <= SMALL or (like and area <= LARGE):
                group.append(row)
                continue
        groups.append([row])
    return groups
