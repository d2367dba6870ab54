"""Blocks of unpadded rows: every token comes back to its place, and padding adds no gradient."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turret.ops import attention as blocks
from turret.ops.attention import BlockLayout, BlockSide, rounded_size

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=9)


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    return [(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.integers(1, 3), st.integers(0, 9))
def test_every_token_comes_back_with_its_own_gradient(lengths: list[int], kinds: int, seed: int) -> None:
    layout = BlockLayout.of(spans(lengths), spans(lengths), [row % kinds for row in range(len(lengths))], CPU)
    x = torch.randn(1, 2, sum(lengths), 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    parts = []
    for block in layout.blocks:
        padded = block.queries.block(x)
        assert padded.shape == (len(block.queries.lengths), 2, block.queries.longest, 3)
        parts.append(block.queries.unblock(padded))
    y = layout.join(parts)
    assert torch.equal(y, x)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.integers(1, 3))
def test_each_row_is_in_one_block_of_its_own_kind_and_of_like_rows(lengths: list[int], kinds: int) -> None:
    numbers = [row % kinds for row in range(len(lengths))]
    groups = blocks._groups(spans(lengths), spans(lengths), numbers)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len({numbers[row] for row in group}) == 1
        longest, shortest = max(lengths[row] for row in group), min(lengths[row] for row in group)
        assert shortest >= blocks.SHORTER * longest or len(group) * longest**2 <= blocks.SMALL


def test_what_comes_back_to_padding_is_nobodys_gradient() -> None:
    x = torch.ones(1, 1, 7, 2, requires_grad=True)
    side = BlockSide.of(spans([5, 2]), CPU)
    assert side.padded
    side.block(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # and not more for the tokens that stand in for padding


def test_whole_neighbours_are_not_copied_through_an_index() -> None:
    side = BlockSide.of(spans([32, 32]), CPU)
    assert side.start == 0
    assert not side.padded
    assert BlockSide.of(spans([31, 31]), CPU).start is None  # rounded up to 32


def test_a_long_row_begins_another_block_where_the_first_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALL", 0)
    monkeypatch.setattr(blocks, "LARGE", 2 * 40 * 40)
    assert blocks._groups(spans([40] * 5), spans([40] * 5), [0] * 5) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("size", "wanted"), [(1, 8), (8, 8), (64, 64), (65, 80), (256, 256), (257, 288), (2000, 2016)])
def test_sizes_are_rounded_up_in_few_steps(size: int, wanted: int) -> None:
    assert rounded_size(size, blocks.STEPS) == wanted
