"""From a source to examples: columns, labels, splits, duplicates, and what is refused."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from small_tables import NEWS, POLES, labelled, load, write_csv, write_jsonl

from turret.data import Labelled, Pair
from turret.data.columns import Finder
from turret.data.dataset import read_dataset, read_inputs, read_test
from turret.data.source import open_source
from turret.errors import DataError
from turret.recipe import Data, Task
from turret.tasks import TASKS, schemas, task_of
from turret.tasks.classify import Classify
from turret.tasks.generate import Summarize


def labels_of(examples: Any) -> list[Any]:
    return [example.label for example in examples]


def test_tables_load_no_torch() -> None:
    code = "import sys, turret.data.dataset; print([m for m in ('torch', 'pandas', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind not in ("chat", "preference")])
def test_inputs_that_cannot_be_told_are_asked_for_by_options_that_the_task_reads(kind: str) -> None:
    schema, columns = task_of(kind).schema(), ("a", "b")
    with pytest.raises(DataError, match="cannot tell which column") as caught:
        Finder.of(Data(source="x"), columns).inputs(schema)
    roles = [option.replace("-", "_") for option in re.findall(r"--([a-z-]+) COLUMN", str(caught.value))]
    named = dict(zip(roles, columns, strict=False))
    assert set(roles) <= {"text", "text_pair", "prompt"}
    assert Finder.of(Data(source="x", **named), columns).inputs(schema) == named


@pytest.mark.parametrize(
    ("columns", "kind", "roles"),
    [
        (("text", "label"), "classify", {"text": "text", "label": "label"}),
        (("id", "Review", " Sentiment"), "classify", {"text": "Review", "label": "Sentiment"}),
        (("article", "highlights", "id"), "summarize", {"document": "article", "summary": "highlights"}),
        (("document", "summary"), "summarize", {"document": "document", "summary": "summary"}),
        (("prompt", "completion"), "generate", {"prompt": "prompt", "completion": "completion"}),
        (("question", "answer"), "generate", {"prompt": "question", "completion": "answer"}),
    ],
)
def test_obvious_columns_are_guessed_and_the_guess_is_said(
    tmp_path: Path, columns: tuple[str, ...], kind: str, roles: dict[str, str]
) -> None:
    rows = [{name: f"{name} {i % 2 if i else 1}{'' if name.strip() in 'Sentiment label' else i}" for name in columns}
            for i in range(8)]  # fmt: skip
    data = load(write_csv(tmp_path / "t.csv", rows))
    assert (data.kind, data.columns) == (kind, roles)
    note = next(note for note in data.notes if note.startswith("guessed"))
    assert kind in note
    assert all(repr(column) in note for column in roles.values())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".xlsx"])
def test_a_wrong_column_is_an_error_before_the_rows_of_a_large_table_are_read(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"a text with the number {number} and more", "label": "ab"[number % 2]} for number in range(8000)]
    path = tmp_path / f"t{suffix}"
    if suffix == ".xlsx":
        pandas.DataFrame(rows).to_excel(path, index=False)
    else:
        (write_csv if suffix == ".csv" else write_jsonl)(path, rows)

    def seconds(label: str) -> float:
        started = time.process_time()
        with pytest.raises(DataError, match="nope") if label == "nope" else contextlib.nullcontext():
            load(path, text="text", label=label)
        return time.process_time() - started

    seconds("nope")  # imports what reads such a file
    assert 4 * min(seconds("nope") for _ in range(3)) < seconds("label")


def test_columns_that_the_recipe_names_are_no_guess(tmp_path: Path) -> None:
    rows = [{"a": f"x {i}", "b": i % 2} for i in range(8)]
    data = load(write_csv(tmp_path / "t.csv", rows), text="a", label="b", test=2)
    assert data.columns == {"text": "a", "label": "b"}
    assert data.notes == ()


def test_one_named_column_and_one_guessed(tmp_path: Path) -> None:
    rows = [{"a": f"x {i}", "label": i % 2} for i in range(8)]
    assert load(write_csv(tmp_path / "t.csv", rows), text="a").columns == {"text": "a", "label": "label"}


def test_a_summary_may_be_named_prompt_and_completion_when_the_task_is_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"x {i}", "completion": "y"} for i in range(8)]
    assert load(write_csv(tmp_path / "t.csv", rows), "summarize").kind == "summarize"


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"text": "txt"}, None, r"no column 'txt': the columns are 'text', 'label', 'summary', did you mean 'text'\?"),
        ({"label": "y"}, None, "no column 'y': the columns are 'text', 'label', 'summary'$"),
        ({}, None, r"fit classify \('text', 'label'\) and summarize \('text', 'summary'\): set task.kind"),
        ({"text": "text", "summary": "summary"}, None, "belong to different tasks: name one pair"),
        ({"label": "label"}, "summarize", "data.label does not belong to summarize: name document and summary"),
        ({}, "generate", None),
    ],
)
def test_columns_that_do_not_fit_are_refused_with_those_that_are_there(
    tmp_path: Path, fields: dict[str, str], kind: Any, said: str | None
) -> None:
    rows = [{"text": f"x {i}", "label": i % 2, "summary": "y"} for i in range(8)]
    path = write_csv(tmp_path / "t.csv", rows)
    if said is None:  # a text and its summary are a pair for `generate` too
        assert load(path, kind, **fields).columns == {"document": "text", "summary": "summary"}
        return
    with pytest.raises(DataError, match=said):
        load(path, kind, **fields)


@pytest.mark.parametrize(
    ("heads", "kind", "fields", "said"),
    [
        ("text stars", "regression", {"text": "text"}, "the label beside 'text' is.*: add --label COLUMN$"),
        ("text stars", "regression", {}, r"set data\.text and data\.label \(--text COLUMN --label COLUMN\)$"),
        ("premise hypothesis near", "regression", {"text": "premise"}, "the label beside 'premise' is"),
        ("sentence1 sentence2 near", "regression", {}, r"set data\.text, data\.text_pair and data\.label \("),
        (
            "asked chosen rejected",
            "preference",
            {"chosen": "chosen", "rejected": "rejected"},
            "the prompt beside 'chosen', 'rejected' is.*: add --prompt COLUMN$",
        ),
        ("a b c", "preference", {}, r"set data\.prompt, data\.chosen and data\.rejected$"),
    ],
)
def test_the_columns_that_a_task_lacks_are_the_fewest_that_fit_the_table(
    tmp_path: Path, heads: str, kind: Any, fields: dict[str, str], said: str
) -> None:
    rows = [{head: f"{i} {head}" for head in heads.split()} for i in range(8)]
    with pytest.raises(DataError, match=said):
        load(write_csv(tmp_path / "t.csv", rows), kind, **fields)


def test_unknown_columns_are_listed_with_the_setting_that_names_them(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y"}] * 3
    said = r"cannot tell which columns to use; the columns are 'a', 'b': set data.text.*`turret init FILE`"
    with pytest.raises(DataError, match=said):
        load(write_csv(tmp_path / "t.csv", rows))


def test_a_test_table_without_the_column_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", POLES)
    write_csv(tmp_path / "test.csv", [{"text": "x", "other": "y"}])
    with pytest.raises(DataError, match=r"test.csv has no column 'label': its columns are 'text', 'other'"):
        load(tmp_path)


# --- rows and texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,label\n", "has columns and no rows"),
        ("text,label\na,\n ,x\n", r"no usable row: of 2 rows 1 without 'label' and 1 without 'text'"),
        ("text,label\nonly,x\n", "has one class, 'x'"),
        ("text,label\na,x\nb,\n", "has one class, 'x'"),
    ],
)
def test_a_table_without_anything_to_learn_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        load(tmp_path / "t.csv")


def test_one_row_of_pairs_leaves_none_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 usable rows and 1 of them held out leave none to train on"):
        load(write_csv(tmp_path / "t.csv", NEWS[:1]))


def test_rows_that_lack_a_text_or_a_label_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*POLES, {"text": "x", "label": ""}, {"text": " ", "label": "good"}, {"text": "y", "label": "  "}]
    data = load(write_csv(tmp_path / "t.csv", rows), test=4)
    assert len(data.train) + len(data.test) == 20
    assert "t.csv: 2 of 23 rows without 'label' are left out" in data.notes
    assert "t.csv: 1 of 23 rows without 'text' is left out" in data.notes


def test_nul_and_half_characters_are_replaced_and_counted(tmp_path: Path) -> None:
    rows = [*POLES, {"text": "a\0b", "label": "good"}, {"text": "c\ud800d", "label": "bad"}]
    data = load(write_jsonl(tmp_path / "t.jsonl", rows), test=4)
    texts = {example.text for example in (*data.train, *data.test)}  # type: ignore[union-attr]
    assert {"a b", "c\ufffdd"} <= texts
    assert "t.jsonl: 1 text had NUL characters, which became blanks" in data.notes
    assert "t.jsonl: 1 text had half characters, which became U+FFFD" in data.notes


@pytest.mark.parametrize("text", ["日本語のテキスト", "نص عربي", "🎬🍿", "[PAD] [CLS]", "e\u0301", "\u200b\u200b"])
def test_any_script_is_kept_as_it_is(tmp_path: Path, text: str) -> None:
    data = load(write_jsonl(tmp_path / "t.jsonl", [*POLES, {"text": text, "label": "good"}]), test=4)
    assert text in {example.text for example in (*data.train, *data.test)}  # type: ignore[union-attr]


def test_a_text_that_is_a_number_is_its_digits_and_one_that_is_a_list_is_refused(tmp_path: Path) -> None:
    data = load(write_jsonl(tmp_path / "a.jsonl", [*POLES, {"text": 12, "label": "good"}]), test=4)
    assert "12" in {example.text for example in (*data.train, *data.test)}  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"b.jsonl line 1, column 'text': expected text, found list"):
        load(write_jsonl(tmp_path / "b.jsonl", [{"text": ["a"], "label": "x"}]))


def test_pairs_are_pairs(tmp_path: Path) -> None:
    data = load(write_csv(tmp_path / "t.csv", NEWS))
    assert isinstance(data.train[0], Pair)
    number = data.train[0].source.removeprefix("article ")
    assert data.train[0].target == f"headline {number}"
    assert data.labels == ()


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        ([1, 0], ("0", "1")),
        ([10, 9, 2], ("2", "9", "10")),
        ([1.0, 0.0], ("0", "1")),
        (["1.0", "0.0", "1"], ("0", "1")),
        ([True, False], ("false", "true")),
        (["b", "a"], ("a", "b")),
        ([" b", " a", "b "], ("a", "b")),
        ([1, "a"], ("1", "a")),
        (["ü", "日本"], ("ü", "日本")),
    ],
)
def test_labels_are_words_in_order(tmp_path: Path, written: list[Any], labels: tuple[str, ...]) -> None:
    data = load(write_jsonl(tmp_path / "t.jsonl", labelled(written * 4)), test=2)
    assert data.labels == labels
    assert set(labels_of(data.train)) <= set(labels)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ([0.5, 1], r"line 1, column 'label': the label 0.5 is not a whole number: classes are whole numbers or words"),
        (["0.73", "1"], "line 1, column 'label': the label '0.73' is a fraction"),
        ([float("inf"), 1], "the label inf is not a whole number"),
        (
            ["Good", "good"],
            "the labels 'Good' and 'good' differ in case or blanks only: set data.normalize_labels = true",
        ),
        (["very good", "very  good"], "differ in case or blanks only"),
        (["a", "a"], "column 'label' has one class, 'a': a classifier needs two or more"),
        ([["a", "b"], ["b"]], r"the label is a list \(\['a', 'b'\]\): set task.multi_label = true"),
        ([{"a": 1}, "b"], "expected a label, found dict"),
        (["a\0", "b"], "has NUL or half characters"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, written: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write_jsonl(tmp_path / "t.jsonl", labelled(written * 4)))


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"tokens": ["a", "b"], "tags": ["O", "B-\ud800"]}, {}),
        ({"text": "great film", "mood\ud800": "good", "tone": "bad"}, {"label": ["mood\ud800", "tone"]}),
    ],
)
def test_tags_and_questions_with_half_characters_are_refused_too(tmp_path: Path, row: Any, fields: Any) -> None:
    with pytest.raises(DataError, match="has NUL or half characters"):
        load(write_jsonl(tmp_path / "t.jsonl", [row] * 4), **fields)


def test_a_column_of_texts_is_not_taken_for_labels(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", labelled(f"opinion {i}" for i in range(300)))
    with pytest.raises(DataError, match="has 300 different labels in 300 rows: is it a column of texts or numbers"):
        load(path)


def test_missing_labels_written_as_nothing_or_nan_are_left_out(tmp_path: Path) -> None:
    rows = labelled([1.0, 0.0, None, float("nan")] * 3)
    data = load(write_jsonl(tmp_path / "t.jsonl", rows), test=2)
    assert "t.jsonl: 6 of 12 rows without 'label' are left out" in data.notes


def test_an_unknown_label_in_the_test_split_is_refused_by_name(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", POLES)
    write_csv(tmp_path / "test.csv", [*POLES[:3], {"text": "x", "label": "awful"}])
    with pytest.raises(DataError, match=r"test.csv has the label 'awful' \(1 rows\), which the training table lacks: "
                       "its labels are 'bad', 'good'"):  # fmt: skip
        load(tmp_path)


def test_a_label_of_the_test_split_that_differs_in_case_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", POLES)
    write_csv(tmp_path / "test.csv", [{"text": "x", "label": "GOOD"}])
    with pytest.raises(DataError, match="'GOOD' and 'good' differ in case"):
        load(tmp_path)


def test_classes_with_one_or_no_training_example_are_said(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [*POLES, {"text": "x", "label": "odd"}])
    write_csv(tmp_path / "test.csv", POLES[:4])
    assert "only one training example for the class 'odd'" in load(tmp_path).notes
    few = [load(tmp_path, seed=seed, train=6) for seed in range(5)]
    assert any("no training example for the class 'odd'" in data.notes for data in few)
    assert all(data.labels == ("bad", "good", "odd") for data in few)  # the classes are the table's, not the sample's


def test_a_sample_of_one_class_only_is_refused(tmp_path: Path) -> None:
    rows = labelled(["a"] * 50 + ["b"])
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:3])
    with pytest.raises(DataError, match=r"all 2 training examples have the label 'a': raise data\.train"):
        load(tmp_path, train=2)


# --- several labels --------------------------------------------------------------------------------------------------


def test_several_labels_are_a_list_or_separated_by_bars(tmp_path: Path) -> None:
    rows = labelled([["b", "a"], "a | c", '["c"]', "b", [], "[]", "", None, "a|a"])
    data = load(write_jsonl(tmp_path / "t.jsonl", rows), multi_label=True, test=1)
    found = [*labels_of(data.train), *labels_of(data.test)]
    assert sorted(found) == [(), (), ("a",), ("a", "b"), ("a", "c"), ("b",), ("c",)]
    assert data.labels == ("a", "b", "c")
    assert "t.jsonl: 2 of 9 rows without 'label' are left out" in data.notes


def test_commas_in_multi_labels_are_pointed_out(tmp_path: Path) -> None:
    data = load(write_jsonl(tmp_path / "t.jsonl", labelled(["a, b", "c"] * 4)), multi_label=True)
    assert "labels have commas in them: if a comma separates labels, set data.separator" in data.notes


def test_a_broken_list_of_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="starts like a JSON list, but is not one"):
        load(write_jsonl(tmp_path / "t.jsonl", labelled(["[a, b]"])), multi_label=True)


# --- duplicates and the digest ---------------------------------------------------------------------------------------


def test_inputs_that_are_in_train_and_test_are_counted_and_said(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", POLES)
    write_csv(tmp_path / "test.csv", [{"text": "film 3 ", "label": "good"}, POLES[4], {"text": "new", "label": "bad"}])
    data = load(tmp_path)
    assert data.duplicates == 2
    assert "2 of 3 test inputs occur in the training examples too" in data.notes


def test_a_text_with_two_labels_is_said(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [*POLES, {"text": "film 1", "label": "bad"}])
    write_csv(tmp_path / "test.csv", [{"text": "new", "label": "bad"}])
    assert "1 training text occurs with more than one label" in load(tmp_path).notes


def test_the_digest_is_the_contents_and_nothing_elses(tmp_path: Path) -> None:
    first = load(write_csv(tmp_path / "a.csv", POLES))
    assert first.digest.startswith("sha256:")
    assert load(write_jsonl(tmp_path / "b.jsonl", POLES)).digest == first.digest
    assert load(tmp_path / "a.csv", seed=1).digest != first.digest
    changed = [*POLES[:-1], {**POLES[-1], "text": "film 19!"}]
    assert load(write_csv(tmp_path / "c.csv", changed)).digest != first.digest


def test_more_than_fits_in_memory_goes_to_a_file_and_comes_back_the_same(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", POLES)
    held, every = load(path), schemas(Task())
    spilled = read_dataset(Data(source=str(path)), every, memory=30)
    assert list(spilled.train) == list(held.train)
    assert spilled.digest == held.digest


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", POLES)

    class Growing(Data):
        """Asks for a row count only after the first pass, and by then the file has grown."""

        def __getattribute__(self, name: str) -> Any:
            if name == "test" and reads.append(name) is None and len(reads) == 2:
                write_csv(path, POLES + POLES)
            return super().__getattribute__(name)

    reads: list[str] = []
    with pytest.raises(DataError, match="changed while it was read"):
        read_dataset(Growing(source=str(path)), schemas(Task()))


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nowhere.csv", "./nowhere", "/nowhere/at/all", "a b c", "x\\y", "../../x"])
def test_a_file_that_is_not_there_is_one_line(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no file or folder") as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_a_misspelt_file_gets_the_near_one(tmp_path: Path) -> None:
    write_csv(tmp_path / "reviews.csv", POLES)
    with pytest.raises(DataError, match=r"did you mean '.*reviews.csv'\?"):
        load(tmp_path / "review.csv")


@pytest.mark.parametrize("source", ["a\0b.csv", "  "])
def test_a_source_that_names_nothing_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="names nothing"):
        open_source(source)


def test_an_overlong_source_is_one_line() -> None:
    with pytest.raises(DataError) as caught:
        open_source("x" * 10_000)
    assert len(str(caught.value)) < 1000


def test_a_data_set_of_the_hub_without_a_connection_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"is not a file here, and the Hub did not give it \(.*\): check the name"
    ) as caught:
        load("stanfordnlp/imdb")
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_is_read_with_its_class_names() -> None:
    from turret.data import source

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    table = source._hub_table("owner/name train", part)
    assert list(table.read(["label", "text"])) == [(1, (1, "a")), (2, (-1, "b"))]
    assert table.classes == {"label": ["neg", "pos"]}


# --- for evaluation and prediction -----------------------------------------------------------------------------------


def test_an_evaluation_reads_the_test_split_or_everything(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "all.csv", POLES)
    examples = read_test(Data(source=str(path)), Classify.schema(), labels=("bad", "good")).examples
    assert examples == [Labelled(row["text"], row["label"]) for row in POLES]
    assert len(read_test(Data(source=str(path), test=5), Classify.schema()).examples) == 5
    folder = tmp_path / "parts"
    folder.mkdir()
    write_csv(folder / "train.csv", POLES)
    write_csv(folder / "test.csv", POLES[:3])
    assert len(read_test(Data(source=str(folder)), Classify.schema()).examples) == 3
    assert len(read_test(Data(source=str(folder), test="train"), Classify.schema()).examples) == 20


def test_an_evaluation_on_a_label_that_the_adapter_does_not_know_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", POLES)
    with pytest.raises(
        DataError, match="has the label 'good', which the adapter does not know: it knows 'bad', 'fine'"
    ):
        read_test(Data(source=str(path)), Classify.schema(), labels=("bad", "fine"))


def test_inputs_alone_are_read_from_a_table_or_a_text_file(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"id": 1, "review": "a"}, {"id": 2, "review": ""}])
    assert read_inputs(Data(source=str(path)), Classify.schema()) == ["a", ""]
    assert read_inputs(Data(source=str(path), text="id"), Classify.schema()) == ["1", "2"]
    one = write_csv(tmp_path / "one.csv", [{"whatever": "x"}])
    assert read_inputs(Data(source=str(one)), Summarize.schema()) == ["x"]
    (tmp_path / "t.txt").write_bytes(b"first\r\n\nlast")
    assert read_inputs(Data(source=str(tmp_path / "t.txt")), Classify.schema()) == ["first", "", "last"]
    odd = write_csv(tmp_path / "odd.csv", [{"a": "x", "b": "y"}])
    with pytest.raises(DataError, match="the inputs; the columns are 'a', 'b': name one with --text COLUMN"):
        read_inputs(Data(source=str(odd)), Classify.schema())
