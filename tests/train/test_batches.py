"""Which examples make which step."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turret.errors import DataError
from turret.tasks.task import Encoded
from turret.train.batches import EncodedRow, EncodedRows, Schedule, by_length, micro_batches


def item(tokens: int, target: int | None = None) -> EncodedRow:
    return EncodedRow(
        None, torch.zeros(tokens, dtype=torch.long), None if target is None else torch.zeros(target).long()
    )


def test_every_epoch_shows_every_example_once_in_another_order() -> None:
    schedule = Schedule(examples=10, batch_size=4, epochs=2, seed=1)
    batches = list(schedule.batches())
    assert [len(indices) for _, indices in batches] == [4, 4, 2] * 2
    first = [index for _, indices in batches[:3] for index in indices]
    second = [index for _, indices in batches[3:] for index in indices]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_any_step_can_be_found_again_and_another_seed_shuffles_otherwise() -> None:
    schedule = Schedule(examples=10, batch_size=3, epochs=3, seed=7)
    whole = list(schedule.batches())
    for after in range(len(whole) + 1):
        assert list(schedule.batches(after)) == whole[after:]
    assert list(Schedule(examples=10, batch_size=3, epochs=3, seed=8).batches()) != whole


def test_the_largest_number_of_steps_cuts_the_epochs_short() -> None:
    schedule = Schedule(examples=10, batch_size=4, epochs=2, seed=1, max_steps=4)
    assert schedule.steps == 4
    assert [step for step, _ in schedule.batches()] == [1, 2, 3, 4]
    assert schedule.epoch_after(3) == 1.0
    assert Schedule(examples=10, batch_size=4, epochs=2, seed=1, max_steps=400).steps == 6


def test_no_examples_are_an_error_with_a_remedy() -> None:
    with pytest.raises(DataError, match="no examples to train on"):
        Schedule(examples=0, batch_size=4, epochs=2, seed=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 100))
def test_micro_batches_keep_every_example_in_order_and_within_the_limit(lengths: list[int], most: int) -> None:
    items = [item(length) for length in lengths]
    pieces = micro_batches(items, most)
    assert [each for piece in pieces for each in piece] == items
    for piece in pieces:
        assert sum(each.tokens for each in piece) <= most or len(piece) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 100))
def test_evaluation_pieces_hold_every_index_once_with_its_neighbours_in_length(lengths: list[int], most: int) -> None:
    pieces = by_length(lengths, most)
    flat = [index for piece in pieces for index in piece]
    assert Counter(flat) == Counter(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths)


class Letters:
    """A task whose tokens are the letters of a text."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode_examples(self, examples: Sequence[Any]) -> list[tuple[Encoded, None]]:
        texts = [example.text for example in examples]
        self.calls.append(texts)
        return [(Encoded(torch.arange(len(text)), cut=text == "ccc"), None) for text in texts]


def test_examples_are_encoded_together_once_while_there_is_room_and_anew_after() -> None:
    task = Letters()
    items = EncodedRows(task, [SimpleNamespace(text=text) for text in ("a", "bb", "ccc")], kept_tokens=3)
    for _ in range(2):
        taken = items.take([2, 0, 1, 0])
        assert [len(each.source) for each in taken] == [3, 1, 2, 1]
        assert [each.cut for each in taken] == [True, False, False, False]
        assert all(each.source.dtype == torch.long for each in taken)
    assert task.calls == [["ccc", "a", "bb"], ["a", "bb"]]
    assert items.lengths() == [1, 2, 3]
    assert item(5).weight == 1
    assert item(5, 2).weight == 2
    assert item(5, 2).tokens == 7


class Alternating:
    """A task of one encoded example, with every optional tensor or none."""

    def __init__(self) -> None:
        ids = [torch.arange(300_000, 300_007), torch.tensor([5, 1 << 30]), torch.tensor([2, 4])]
        self.sides = {
            "all": (Encoded(ids[0], cut=True, earlier=ids[2], left_out=3, whole=9), Encoded(ids[1], cut=True)),
            "one": (Encoded(ids[0], cut=False), None),
        }

    def encode_examples(self, examples: Sequence[Any]) -> list[tuple[Encoded, Encoded | None]]:
        return [self.sides[each] for each in examples]


def test_a_row_from_memory_equals_the_encoded_one_and_keeps_no_tensor() -> None:
    items = EncodedRows(Alternating(), ["all", "one"] * 50)  # type: ignore[arg-type, list-item]
    first = items.take(range(100))
    second = items.take(range(100))
    for new, kept in zip(first, second, strict=True):
        for name in ("source", "target", "earlier"):
            ids, found = getattr(new, name), getattr(kept, name)
            assert found is None if ids is None else torch.equal(ids, found) and found.dtype == torch.long
        for name in ("example", "cut", "target_cut", "left_out", "whole", "tokens", "weight"):
            assert getattr(new, name) == getattr(kept, name), name
    assert len(tensors_in(second)) >= 200  # the count would notice them
    assert len(tensors_in(items._cached)) <= 1


def tensors_in(root: object) -> dict[int, torch.Tensor]:
    """The tensors that an object holds, by their number."""
    found: dict[int, torch.Tensor] = {}
    seen, left = set[int](), [root]
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            found[id(each)] = each
        elif id(each) not in seen and not isinstance(each, type):
            seen.add(id(each))
            left += gc.get_referents(each)
    return found
