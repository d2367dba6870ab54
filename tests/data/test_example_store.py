"""Examples are the same whether they are kept in memory or in a file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret.data import Conversation, Dataset, Example, Labelled, Pair, Turn
from turret.data.examples import ExampleStore, load_dataset, write_dataset

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
examples = st.one_of(
    st.lists(st.builds(Labelled, text, text), max_size=12),
    st.lists(st.builds(Labelled, text, st.lists(text, max_size=3).map(tuple)), max_size=12),
    st.lists(st.builds(Pair, text, text), max_size=12),
)


@given(examples=examples, memory=st.integers(0, 60), order=st.randoms())
def test_what_is_put_in_any_order_comes_back_in_its_place(examples: list[Example], memory: int, order: object) -> None:
    places = list(range(len(examples)))
    order.shuffle(places)  # type: ignore[attr-defined]
    kept = ExampleStore(len(examples), memory)
    for place in places:
        kept.put(place, examples[place])
    assert list(kept.done()) == examples
    assert len(kept) == len(examples)
    assert kept[1:4] == examples[1:4]


def test_small_data_stays_in_memory_and_large_data_does_not() -> None:
    small, large = ExampleStore(2, 100), ExampleStore(2, 100)
    for place in range(2):
        small.put(place, Pair("a" * 10, "b"))
        large.put(place, Pair("a" * 100, "b"))
    assert not small.done().on_disk
    assert large.done().on_disk
    assert large[-1] == Pair("a" * 100, "b")
    with pytest.raises(IndexError):
        large[2]


def test_threads_may_read_at_once() -> None:
    kept = ExampleStore(200, 0)
    for place in range(200):
        kept.put(place, Labelled(f"text {place}" * 50, str(place)))
    kept.done()
    with ThreadPoolExecutor(8) as pool:
        assert [e.label for e in pool.map(kept.__getitem__, list(range(200)) * 5)] == [str(i) for i in range(200)] * 5


@pytest.mark.parametrize("memory", [0, 1_000_000])
def test_a_data_set_passes_to_another_process_unchanged(tmp_path, memory: int) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "", '[{"a": 1}]'), Turn("tool", "b", name="c", call_id="d"))
    train = [Labelled("é\ud800\n", "x"), Labelled("b", ("x", "y")), Pair("c", "d", ("e",)), Conversation(turns, "[]")]
    given = Dataset(train, [], [Pair("", "")], "classify", ("x", "y"), {"text": "t"}, ("a note",), 3, "sha256:a")
    write_dataset(given, tmp_path / "file")
    found = load_dataset(tmp_path / "file", memory)
    assert list(found.train) == train
    assert (list(found.validation), list(found.test)) == ([], [Pair("", "")])
    for name in ("kind", "labels", "columns", "notes", "duplicates", "digest"):
        assert getattr(found, name) == getattr(given, name)
