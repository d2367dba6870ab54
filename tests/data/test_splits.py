"""The rows of each role by name, number, fraction and seed. The test rows never depend on the training size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret.data.dataset import Chosen, choose_rows, find_sources, shuffle_rows
from turret.data.dataset import test_split as split_to_test
from turret.errors import DataError
from turret.recipe import Data


def taken(counts: dict[str, int], seed: int = 42, **wanted: Any) -> Chosen:
    data = Data(source="x", **wanted)
    return choose_rows(data, find_sources(data, list(counts)), counts, seed)


def sizes(chosen: Chosen) -> tuple[int, int, int]:
    return len(chosen.rows["train"]), len(chosen.rows["validation"]), len(chosen.rows["test"])


@pytest.mark.parametrize(
    ("counts", "wanted", "expected"),
    [
        ({"": 100}, {}, (80, 0, 20)),
        ({"": 50_000}, {}, (49_000, 0, 1000)),
        ({"": 2}, {}, (1, 0, 1)),
        ({"": 100}, {"train": 30, "test": 10}, (30, 0, 10)),
        ({"": 100}, {"train": 0.5, "test": 0.25, "validation": 0.1}, (50, 10, 25)),
        ({"": 100}, {"validation": 7}, (73, 7, 20)),
        ({"train": 100, "test": 30}, {}, (100, 0, 30)),
        ({"train": 100, "dev": 20, "test": 30}, {}, (100, 20, 30)),
        ({"train": 100, "dev": 20, "test": 30}, {"train": 10, "validation": 5, "test": 0.1}, (10, 5, 3)),
        ({"train": 100, "validation": 20}, {"test": "validation"}, (100, 0, 20)),
        ({"train": 100, "validation": 20}, {"test": "val", "validation": 10}, (90, 10, 20)),
        ({"train": 100, "validation": 20}, {}, (80, 20, 20)),
        ({"train": 100, "test": 30, "unsupervised": 9}, {"train": "unsupervised"}, (9, 0, 30)),
        ({"a": 10, "b": 20}, {"train": "a", "test": "b"}, (10, 0, 20)),
        ({"test": 10}, {}, (8, 0, 2)),
    ],
)
def test_the_splits_are_as_the_recipe_says(
    counts: dict[str, int], wanted: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    assert sizes(taken(counts, **wanted)) == expected


def test_a_test_that_is_held_out_unasked_is_said() -> None:
    assert taken({"": 100}).notes == ("no test split and none asked for: 20 of 100 rows are held out for the test",)


def test_fewer_rows_than_asked_for_are_all_used_and_said() -> None:
    chosen = taken({"train": 10, "test": 3}, train=100, test=50)
    assert sizes(chosen) == (10, 0, 3)
    assert "train: 100 examples asked for, 10 are there, all of them are used" in chosen.notes
    assert "test: 50 examples asked for, 3 are there, all of them are used" in chosen.notes


@pytest.mark.parametrize(
    ("counts", "wanted", "said"),
    [
        ({"": 10}, {"test": "dev"}, r"data.test = 'dev', but the source is one table without splits"),
        (
            {"train": 9, "test": 9},
            {"validation": "extra"},
            "data.validation = 'extra', but the splits are 'train', 'test'",
        ),
        ({"train": 9, "test": 9}, {"train": "test", "test": "test"}, "train and test are both the split 'test'"),
        ({"train": 9, "test": 9}, {"test": "train"}, "there is no training split"),
        ({"a": 9, "b": 9}, {}, "there is no training split: the splits are 'a', 'b', so name one in data.train"),
        ({"": 10}, {"test": 10}, "10 usable rows and 10 of them held out leave none to train on"),
        ({"": 10}, {"test": 8, "validation": 5}, "10 usable rows and 13 of them held out"),
        ({"": 1}, {}, "1 usable rows and 1 of them held out"),
    ],
)
def test_splits_that_cannot_be_are_refused(counts: dict[str, int], wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        taken(counts, **wanted)


size = st.none() | st.integers(1, 30) | st.floats(0.05, 0.4)


@given(count=st.integers(100, 300), seed=st.integers(0, 2**32 - 1), train=size, validation=size, test=size)
def test_no_row_serves_two_roles_and_the_seed_decides(
    count: int, seed: int, train: Any, validation: Any, test: Any
) -> None:
    wanted = {"train": train, "validation": validation, "test": test}
    chosen = taken({"": count}, seed, **wanted)
    rows = np.concatenate(list(chosen.rows.values()))
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < count
    again = taken({"": count}, seed, **wanted)
    assert all(np.array_equal(chosen.rows[role], again.rows[role]) for role in chosen.rows)


@given(seed=st.integers(0, 1000), fewer=st.integers(1, 50), more=st.integers(1, 50))
def test_the_test_rows_do_not_depend_on_how_many_training_rows_are_asked_for(seed: int, fewer: int, more: int) -> None:
    one = taken({"": 100}, seed, train=fewer, test=20, validation=10)
    other = taken({"": 100}, seed, train=more, test=20, validation=10)
    assert np.array_equal(one.rows["test"], other.rows["test"])
    common = min(fewer, more)
    assert np.array_equal(one.rows["train"][:common], other.rows["train"][:common])


def test_the_shuffle_is_the_same_for_good() -> None:
    assert shuffle_rows(10, 42).tolist() == [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]


@pytest.mark.parametrize(
    ("splits", "test", "found"),
    [
        (["train", "test"], None, "test"),
        (["train", "dev"], None, "dev"),
        ([""], None, ""),
        (["whatever"], 5, "whatever"),
        (["train", "test"], "train", "train"),
    ],
)
def test_an_evaluation_takes_the_test_split_or_the_next_best(splits: list[str], test: Any, found: str) -> None:
    assert split_to_test(Data(source="x", test=test), splits) == found


def test_an_evaluation_without_an_obvious_split_asks() -> None:
    with pytest.raises(DataError, match="which split to evaluate on"):
        split_to_test(Data(source="x"), ["a", "b"])
