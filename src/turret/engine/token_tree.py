"""Rows of tokens as a tree: what rows have in common at their start is one node, and is read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile

LEAST = 32  # tokens that a node saves: a pass of its own costs about as much


@dataclass(eq=False)
class Node:
    """Tokens that rows have in common.

    Args:
        ids: the tokens.
        start: how many tokens its rows have before them, in the nodes above.
        rows: the numbers of its rows.
        children: what its rows have after them.
    """

    ids: Sequence[int]
    start: int
    rows: Sequence[int]
    children: list[Node] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


def token_tree(rows: Sequence[Sequence[int]], slots: Sequence[int], *, shared: bool = True) -> list[Node]:
    """The topmost nodes, by slot. Each row is the tokens of one path.

    Args:
        rows: one token or more each.
        slots: the adapter's slot of each row: only rows of one slot have a node in common.
        shared: False: each row is a node of its own.
    """
    order = sorted(range(len(rows)), key=lambda row: (slots[row], rows[row]))
    if not shared:
        return [Node(rows[row], 0, [row]) for row in order]
    own = (list(each) for _, each in groupby(order, key=slots.__getitem__))
    return [node for each in own for node in _nodes(rows, each, 0, 0)]


def _nodes(rows: Sequence[Sequence[int]], own: Sequence[int], start: int, known: int) -> Iterator[Node]:
    """The nodes of some sorted rows after `start`. known: how many tokens they are known to have in common."""
    first, last = rows[own[0]], rows[own[-1]]
    end = known + common(first[known:], last[known:])
    if len(own) == 1 or (len(own) - 1) * (end - start) >= LEAST:
        going = [row for row in own if len(rows[row]) > end]
        children = [child for part in _parts(rows, going, end) for child in _nodes(rows, part, end, end)]
        yield Node(first[start:end], start, own, children)
        return
    ended = [row for row in own if len(rows[row]) == end]
    if ended:
        yield Node(first[start:end], start, ended)
    for part in _parts(rows, own[len(ended) :], end):
        yield from _nodes(rows, part, start, end)


def _parts(rows: Sequence[Sequence[int]], own: Iterable[int], place: int) -> Iterator[list[int]]:
    """The sorted rows by their token at a place."""
    return (list(each) for _, each in groupby(own, key=lambda row: rows[row][place]))


def common(first: Sequence[int], last: Sequence[int]) -> int:
    """How many tokens two rows have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
