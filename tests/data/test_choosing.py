"""Groups, stratified splits, duplicates, spellings of labels and several references per source."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tables import POLES, labelled, load, write_csv, write_jsonl

from turret.data import Dataset, Pair
from turret.data.cells import joined_by
from turret.data.dataset import Kinship, arrange_rows, choose_rows, find_sources, read_dataset, read_test
from turret.errors import DataError
from turret.recipe import Data, Task
from turret.tasks import schemas
from turret.tasks.classify import Classify
from turret.tasks.generate import Generate


def rare(count: int = 100) -> list[dict[str, Any]]:
    """One row in ten is of the class b."""
    return labelled("b" if row % 10 == 0 else "a" for row in range(count))


def shares(data: Dataset) -> list[float]:
    return [Counter(str(e.output) for e in part)["b"] / len(part) for part in (data.train, data.validation, data.test)]


# --- stratified splits -----------------------------------------------------------------------------------------------


def test_stratified_splits_have_the_same_shares_and_others_do_not(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", rare())
    for seed in range(5):
        assert shares(load(path, seed=seed, stratify=True, test=20, validation=20, train=40)) == [0.1, 0.1, 0.1]
    assert any(shares(load(path, seed=seed, test=20, validation=20, train=40))[2] != 0.1 for seed in range(5))


@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=5), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_every_stretch_of_a_stratified_order_has_each_class_in_its_share(
    counts: list[int], seed: int, data: st.DataObject
) -> None:
    classes = np.repeat(np.arange(len(counts)), counts)
    order = arrange_rows(len(classes), seed, Kinship(classes=classes))
    assert sorted(order) == list(range(len(classes)))
    start = data.draw(st.integers(0, len(classes)))
    end = data.draw(st.integers(start, len(classes)))
    for each, total in enumerate(counts):
        found = int((classes[order[start:end]] == each).sum())
        wanted = (end - start) * total / len(classes)
        assert abs(found - wanted) <= len(counts) + 1


def test_several_labels_are_stratified_by_the_rarest_one(tmp_path: Path) -> None:
    rows = labelled([["a", "b"] if row % 10 == 0 else ["a"] for row in range(100)])
    data = load(write_jsonl(tmp_path / "t.jsonl", rows), multi_label=True, stratify=True, test=20)
    assert sum("b" in example.output for example in data.test) == 2


def test_stratified_texts_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"prompt": f"p {i}", "completion": "c"} for i in range(9)])
    with pytest.raises(DataError, match=r"data\.stratify needs classes, and generate has none: leave it out"):
        load(path, stratify=True)


# --- groups ----------------------------------------------------------------------------------------------------------


@given(
    groups=st.lists(st.integers(0, 8), min_size=30, max_size=80),
    seed=st.integers(0, 2**32 - 1),
    test=st.integers(1, 10),
    validation=st.integers(1, 10),
)
def test_no_group_is_on_both_sides_of_a_split(groups: list[int], seed: int, test: int, validation: int) -> None:
    data = Data(source="x", test=test, validation=validation)
    kin = {"": Kinship(groups=np.array(groups, dtype=np.uint64))}
    try:
        chosen = choose_rows(data, find_sources(data, [""]), {"": len(groups)}, seed, kin)
    except DataError as error:
        assert "cannot be split so that one is left to train on" in str(error)  # noqa: PT017 - few groups
        return
    parts = {role: {groups[row] for row in rows} for role, rows in chosen.rows.items()}
    assert not parts["train"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert not parts["test"] & parts["validation"]
    assert sum(len(rows) for rows in chosen.rows.values()) == len(groups)


def test_a_group_of_a_table_stays_together_and_without_it_does_not(tmp_path: Path) -> None:
    rows = [{"text": f"visit {i}", "label": i % 2, "Patient": i // 4} for i in range(80)]
    path = write_csv(tmp_path / "t.csv", rows)
    patient = {row["text"]: row["Patient"] for row in rows}

    def shared(data: Dataset) -> set[Any]:
        return {patient[e.input] for e in data.train} & {patient[e.input] for e in data.test}

    assert shared(load(path, group="patient")) == set()
    assert shared(load(path)) != set()  # the control


def test_rows_without_a_group_are_groups_of_their_own(tmp_path: Path) -> None:
    rows = [{"text": f"visit {i}", "label": i % 2, "who": "" if i % 2 else i // 4} for i in range(40)]
    data = load(write_csv(tmp_path / "t.csv", rows), group="who")
    assert "t.csv: 20 rows without a group are groups of their own" in data.notes


def test_groups_that_two_split_files_share_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.csv", [{**row, "who": i // 5} for i, row in enumerate(POLES)])
    with pytest.raises(DataError, match="share 4 groups of 'who': give one table"):
        load(tmp_path, group="who")


def test_groups_and_stratified_splits_exclude_each_other(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{**row, "who": i // 5} for i, row in enumerate(POLES)])
    with pytest.raises(DataError, match=r"data\.group and data\.stratify cannot be met together"):
        load(path, group="who", stratify=True)


# --- duplicates ------------------------------------------------------------------------------------------------------


def test_duplicates_are_dropped_on_request_and_counted(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [*POLES, *POLES[:5], {"text": "film 3 ", "label": "good"}])
    data = load(path, drop_duplicates=True)
    assert len(data.train) + len(data.test) == 20
    assert "6 rows that repeat another one are left out" in data.notes
    assert data.duplicates == 0
    assert load(path).duplicates > 0  # the control


def test_training_rows_whose_input_is_held_out_are_dropped(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [*POLES, {"text": "new", "label": "good"}])
    write_csv(tmp_path / "test.csv", [*POLES[:4], {"text": "new", "label": "bad"}])
    data = load(tmp_path, drop_duplicates=True)
    assert (len(data.train), len(data.test), data.duplicates) == (16, 5, 0)
    assert "5 training rows are left out, because their inputs are held out too" in data.notes


# --- labels ----------------------------------------------------------------------------------------------------------


def test_spellings_of_a_label_become_the_most_frequent_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", labelled(["Good", "Good", "good", "GOOD ", "bad"] * 4))
    data = load(path, normalize_labels=True, test=4)
    assert data.labels == ("Good", "bad")
    assert any("one class: 'GOOD' is 'Good' and 1 more" in note for note in data.notes)


def test_an_evaluation_respells_labels_as_the_version_knows_them(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"text": "a", "label": "GOOD"}, {"text": "b", "label": "bad"}])
    with pytest.raises(DataError, match=r"it knows 'Good', 'bad'; set data\.normalize_labels = true"):
        read_test(Data(source=str(path)), Classify.schema(), labels=("Good", "bad"))
    rows = read_test(Data(source=str(path), normalize_labels=True), Classify.schema(), labels=("Good", "bad"))
    assert [example.output for example in rows.examples] == ["Good", "bad"]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["sport", "politics", "sport|politics"], ("|", "sport|politics")),
        (["a; b", "b; c", "a; c", "a; b; c"], (";", "a; b")),
        (["a, b", "a"], None),
        (["Washington, DC", "Portland, OR"], None),
        (["sport/tennis", "sport/golf", "news"], None),
        (["C++", "C", "Java"], None),
        (["very good", "good"], None),
        ([], None),
    ],
)
def test_joined_labels_are_told_from_labels_with_signs(labels: list[str], found: tuple[str, str] | None) -> None:
    assert joined_by(labels) == found


def test_a_separator_of_labels_splits_cells(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", labelled(["a; b", "b", "a;c", '["a"]'] * 3))
    data = load(path, multi_label=True, separator=";", test=1)
    assert data.labels == ("a", "b", "c")
    assert {example.output for example in data.train} == {("a", "b"), ("b",), ("a", "c"), ("a",)}


# --- several references ----------------------------------------------------------------------------------------------


def test_a_source_with_several_references_is_several_training_examples_and_one_test_example(tmp_path: Path) -> None:
    rows = [
        {"source": f"s {i}", "references": [f"r {i} {k}" for k in range(1 + i % 3)] + ["", f"r {i} 0"]}
        for i in range(12)
    ]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    data = load(path, test=4)
    assert data.columns == {"prompt": "source", "completion": "references"}
    tested = {example.input for example in data.test}
    wanted = {(f"s {i}", f"r {i} {k}") for i in range(12) for k in range(1 + i % 3) if f"s {i}" not in tested}
    assert len(tested) == 4
    assert {(example.input, example.output) for example in data.train} == wanted
    assert len(data.train) == len(wanted)
    for example in data.test:
        assert isinstance(example, Pair)
        number = int(example.source.removeprefix("s "))
        assert example.references == tuple(f"r {number} {k}" for k in range(1 + number % 3))
    assert any("have several references" in note for note in data.notes)
    again = load(path, test=4, seed=42)
    assert again.digest == data.digest


def test_references_survive_the_temporary_file(tmp_path: Path) -> None:
    rows = [{"source": f"s {i}", "references": ["a", "b"]} for i in range(8)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    every, source = schemas(Task()), Data(source=str(path))
    assert list(read_dataset(source, every, memory=10).test) == list(load(path).test)


def test_metrics_take_the_best_reference() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    from turret.tasks import metrics

    given = ["the cat sat on the mat today", "a dog runs in the park now"]
    references = [("a cat is on a mat", "the cat sat on the mat"), ("a dog runs in the park",)]
    found = metrics.texts(given, references, None)
    streams = [["a cat is on a mat", "a dog runs in the park"], ["the cat sat on the mat", None]]
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(given, streams).score)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(r, text)["rougeL"].fmeasure for r in each)
        for text, each in zip(given, references, strict=True)
    ]
    assert found["rougeL"] == pytest.approx(sum(best) / 2)
    first = metrics.texts(given, [each[:1] for each in references], None)  # the control
    assert first["rougeL"] < found["rougeL"]
    assert first["bleu"] < found["bleu"]
    pair = Pair("x", references[0][0], references[0][1:])
    assert Generate.score("the cat sat on the mat", pair) == 1.0
