"""What a version gets wrong: `evaluate` and `predict` on tables, sets of labels, and files that a spreadsheet opens."""

from __future__ import annotations

import codecs
import csv
import json
import math
import random
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import small_models
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from turret.cli.main import run
from turret.compare.results import Details, RunReport
from turret.data import Prompt, TextPair, Turn
from turret.data.source import open_table
from turret.data.table_writer import TableWriter, TextForm, escape_formula
from turret.errors import AdapterError, DataError, NotFound
from turret.recipe import Recipe
from turret.tasks import Mistake
from turret.tasks.calibration import stored_by_question
from turret.workspace import RunResult, Workspace, reading
from turret.workspace.answering import PredictOptions

GOOD, BAD = ("great film", "a pleasure", "quick and great"), ("dull story", "boring and lazy", "a dull bank")
FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0_1"


def rows(first: int, count: int, wrong: int = 0) -> list[list[str]]:
    """Texts and labels; every `wrong`-th label is the other one."""
    found = []
    for number in range(first, first + count):
        good = bool(number % 2) != bool(wrong and number % wrong == 0)
        words = (GOOD if number % 2 else BAD)[number // 2 % 3]
        found.append([f"{words}, number {number}", "good" if good else "bad"])
    return found


def table(path: Path, columns: list[str], content: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *content])
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@dataclass
class Trained:
    """A classifier that was trained with a validation split, and a table with a few wrong labels."""

    folder: Path
    workspace: Workspace
    result: RunResult
    data: Path

    @property
    def store(self) -> list[str]:
        return ["--store", str(self.workspace.store.root)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("mistakes")
    base = small_models.save_base("bert", folder / "bert")
    (folder / "reviews").mkdir()
    for split, part in (("train", rows(0, 40)), ("validation", rows(100, 40, wrong=8)), ("test", rows(200, 8))):
        table(folder / "reviews" / f"{split}.csv", ["text", "label"], part)
    workspace = Workspace(folder / "store")
    recipe = Recipe(
        name="reviews",
        base=str(base),
        data=str(folder / "reviews"),
        task={"max_tokens": 24},
        train={"epochs": 3, "lr": 5e-3, "evaluate": "never"},
    )
    data = table(
        folder / "later.csv", ["id", "text", "label"], [[f"#{n}", *row] for n, row in enumerate(rows(300, 30, 7))]
    )
    return Trained(folder, workspace, workspace.train(recipe), data)


# --- the calibration of a training ------------------------------------------------------------------------------------


def test_a_training_with_a_validation_split_stores_a_calibration_with_the_version(trained, capsys) -> None:
    version = trained.workspace.resolve("reviews")
    fitted = version.task["calibration"]
    assert fitted["examples"] == len(fitted["scores"]) == 40
    assert fitted["temperature"] > 0
    assert not fitted["chose_weights"]
    assert trained.result.metrics["validation"]["ece"] < 0.3
    assert trained.workspace.verify().ok
    assert run(["show", "reviews", *trained.store]) == 0
    assert re.search(r"calibration +temperature [\d.]+, from 40 validation examples", capsys.readouterr().out)


def test_a_training_keeps_what_its_version_got_wrong_on_held_out_examples(trained) -> None:
    kept = trained.workspace.run_report(trained.result)
    found = trained.workspace.evaluate("reviews", trained.folder / "reviews" / "test.csv").details
    assert (kept.split, kept.examples, kept.wrong) == ("test", 8, len(found.mistakes))
    assert kept.details.confusion == found.confusion
    assert kept.details.coverage == found.coverage
    assert sum(each.count for each in kept.details.reliability[""].bins) == 8
    assert kept.details.reliability[""].ece == pytest.approx(found.reliability[""].ece, abs=0.02)
    assert [each.asked for each in kept.details.mistakes] == [each.asked for each in found.mistakes]
    with pytest.raises(NotFound, match="no run"):
        trained.workspace.run_report("20000101-000000-000000")


def test_an_evaluation_says_how_many_of_its_examples_training_used(trained, tmp_path, monkeypatch) -> None:
    own = trained.folder / "reviews"

    def said(path: Path) -> list[str]:
        return [note for note in trained.workspace.evaluate("reviews", path).notes if "trained on" in note]

    mixed = table(tmp_path / "mixed.csv", ["text", "label"], [*rows(30, 20), *rows(100, 5), *rows(200, 8)])
    assert said(mixed) == [
        "reviews@1 was trained on 15 of 33 examples, so its scores are too high: measure on examples that training "
        "left out"
    ]
    assert said(own / "test.csv") == [], "the control: held out"
    kept = (own / "train.csv").read_bytes()
    try:
        table(own / "train.csv", ["text", "label"], rows(0, 39))
        assert said(mixed) == [], "these rows are not the version's any more"
        (own / "train.csv").unlink()
        assert said(mixed) == []
    finally:
        (own / "train.csv").write_bytes(kept)
    assert len(said(mixed)) == 1
    for source in ("x" * 5000, "a\0b", "imdb", str(tmp_path / "none"), str(tmp_path)):
        monkeypatch.setattr(reading, "trained_on", lambda _, source=source: {"source": source, "text": "text"})
        assert reading.trained_on_note(trained.workspace.store, trained.workspace.resolve("reviews"), []) == []


PROMPT = Prompt((Turn("system", "be brief"), Turn("user", "hi")))


@pytest.mark.parametrize("asked", ["a text", TextPair("a", "b"), PROMPT, "x" * 10_000])
def test_the_report_of_a_run_survives_json(asked) -> None:
    details = Details(tuple(Mistake(n, asked, ["a"], "b", 0.5) for n in range(100)), "classify", numbers=((1.0, 2.0),))
    report = RunReport.of("test", 200, details)
    assert RunReport.from_json(report.to_json()) == report
    assert (report.wrong, len(report.details.mistakes)) == (100, 60)
    assert report.details.mistakes[0].asked == asked or len(report.details.mistakes[0].text) == 4000


def test_the_engine_and_predict_give_the_same_calibrated_answers_and_sets(trained) -> None:
    texts = [text for text, _ in rows(300, 6)]
    expected = trained.workspace.predict("reviews", texts, coverage=0.9)
    with trained.workspace.engine(str(trained.folder / "bert")) as engine:
        for answer, wanted in zip(engine.classify(texts, "reviews", coverage=0.9), expected, strict=True):
            assert answer["label_set"] == wanted["label_set"]
            assert answer["probabilities"] == pytest.approx(wanted["probabilities"], abs=0.01)
        assert "label_set" not in engine.classify(texts[:1], "reviews")[0]
        with pytest.raises(DataError, match=r"coverage 0\.999 needs 999 validation examples"):
            engine.classify(texts[:1], "reviews", coverage=0.999)


def test_a_bundle_with_a_calibration_is_exported_and_imported_as_the_same_version(trained, tmp_path) -> None:
    trained.workspace.export("reviews", tmp_path / "out")
    other = Workspace(tmp_path / "store")
    assert other.import_adapter(str(tmp_path / "out"), "reviews").digest == trained.result.digest
    assert other.predict("reviews", ["a great film"], coverage=0.8)[0]["label_set"]


def test_a_version_of_0_1_answers_and_says_in_one_line_that_it_has_no_calibration(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(shutil.copytree(FIXTURE, tmp_path / "v0_1"))
    assert run(["predict", "reviews-lora@1", "a great film", "--store", "store"]) == 0
    capsys.readouterr()
    assert run(["predict", "reviews-lora@1", "a great film", "--coverage", "0.9", "--store", "store"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("turret: reviews-lora@1 has no calibration, which a coverage needs: train it again with")
    assert err.count("\n") == 1
    assert run(["predict", "writer@1", "a film", "--coverage", "0.9", "--store", "store"]) == 1
    assert "writer@1 gives no probability of labels: ask it without coverage" in capsys.readouterr().err
    refused = pytest.raises(AdapterError, match="reviews-lora@1 has no calibration")
    with Workspace("store").engine("bases/bert", dtype="float32") as engine, refused:
        engine.classify(["a great film"], "reviews-lora@1", coverage=0.9)


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_the_table_by_class_and_the_confusions_are_those_of_scikit_learn(trained) -> None:
    found = trained.workspace.evaluate("reviews", str(trained.data))
    right = [label for _, label in rows(300, 30, 7)]
    given = [each["label"] for each in trained.workspace.predict("reviews", [text for text, _ in rows(300, 30, 7)])]
    columns = precision_recall_fscore_support(right, given, labels=["bad", "good"], zero_division=0)
    for place, label in enumerate(("bad", "good")):
        row = found.metrics["per_class"][label]
        assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(
            [column[place] for column in columns]
        )
    assert found.details.confusion is not None
    assert found.details.confusion.counts == tuple(map(tuple, confusion_matrix(right, given, labels=["bad", "good"])))


def test_mistakes_have_their_text_and_the_line_of_their_row_the_surest_first(trained) -> None:
    found = trained.workspace.evaluate("reviews", str(trained.data))
    mistakes = found.details.mistakes
    assert mistakes
    lines = trained.data.read_text(encoding="utf-8").splitlines()
    for each in mistakes:
        assert each.text in lines[each.row - 1]
        assert lines[each.row - 1].endswith(f",{each.right}")
        assert each.given != each.right
    sure = [each.confidence for each in mistakes]
    assert sure == sorted(sure, reverse=True)
    assert len(mistakes) == 30 - round(30 * found.metrics["accuracy"])


def test_evaluate_measures_the_calibration_and_the_coverage(trained) -> None:
    details = trained.workspace.evaluate("reviews", str(trained.data)).details
    (sure,) = details.reliability.values()
    assert sure.calibrated_on == 40
    assert sum(each.count for each in sure.bins) == 30
    assert sure.raw_ece is not None
    assert details.coverage is not None
    assert details.coverage.low < details.coverage.measured <= details.coverage.high
    assert 1 <= details.coverage.mean_size <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["questions", "token_classification", "rerank"])
def test_what_is_too_sure_is_calibrated_everywhere(kind: str, tmp_path, capsys) -> None:
    """A model is trained on labels that the text tells, and held against labels that are often drawn by chance."""
    base, draw = small_models.save_base("bert", tmp_path / "bert"), random.Random(3)

    def row(number: int, by_chance: float) -> dict[str, Any]:
        topics, speeds = ("film", "bank"), ("quick", "lazy")
        topic, urgent = topics[number % 2], speeds[number // 2 % 2]
        noisy = lambda right, *others: draw.choice((right, *others)) if draw.random() < by_chance else right
        words = [urgent, topic, "fox", "dog", "story", "market"]
        if kind == "questions":
            answers = {"topic": noisy(topic, *topics), "urgent": noisy(urgent, *speeds)}
            return {"text": f"{' '.join(words)} {number}", **answers}
        if kind == "rerank":
            relevant = noisy(topic, *topics) == "film"
            return {"query": f"a film {number}", "passage": " ".join(words), "label": int(relevant)}
        tags = [noisy("B-SPEED", "O"), noisy("B-TOPIC", "O"), "O", "O", "O", "O", "O"]
        return {"tokens": [*words, str(number)], "tags": tags}

    (tmp_path / "data").mkdir()
    for split, count in (("train", 120), ("validation", 150), ("test", 100)):
        lines = [json.dumps(row(number, 0.0 if split == "train" else 0.6)) for number in range(count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    data = {"source": str(tmp_path / "data")} | ({"label": ["topic", "urgent"]} if kind == "questions" else {})
    workspace = Workspace(tmp_path / "store")
    train = {"epochs": 6, "lr": 1e-2, "evaluate": "never", "dtype": "float32"}
    result = workspace.train(Recipe(name="sure", base=str(base), data=data, task={"kind": kind}, train=train))
    version = workspace.resolve("sure")
    fitted = stored_by_question(version.task["calibration"])
    assert list(fitted) == (["topic", "urgent"] if kind == "questions" else [""])
    assert max(each["temperature"] for each in fitted.values()) > 1.2, "it is too sure"
    test = str(tmp_path / "data" / "test.jsonl")
    found = workspace.evaluate("sure", test)
    assert found.metrics["ece"] == pytest.approx(result.metrics["test"]["ece"], abs=0.02)
    for question, sure in found.details.reliability.items():
        assert (sure.temperature, sure.calibrated_on) == (fitted[question]["temperature"], 150)
        assert sure.temperature == 1 or sure.ece < sure.raw_ece

    texts: list[Any] = ["quick film fox dog", "lazy bank story"]
    texts = [TextPair("a film", text) for text in texts] if kind == "rerank" else texts
    expected = workspace.predict("sure", texts)
    with workspace.engine(str(base), dtype="float32") as engine:
        answers = engine.classify(texts, "sure")
    for one, other in zip(answers, expected, strict=True):
        for key, value in numbers_in(one).items():
            assert value == pytest.approx(numbers_in(other)[key], abs=0.01)
    assert (
        run(["evaluate", "sure", test, "--store", str(workspace.store.root), "--report", str(tmp_path / "p.html")]) == 0
    )
    out, page = capsys.readouterr().out, (tmp_path / "p.html").read_text()
    assert len(re.findall(r"ECE 0\.\d+ with temperature", out)) == len(fitted)
    assert page.count("that was fitted on 150 validation examples") == page.count("Bars: the share") == len(fitted)
    assert run(["show", "sure", "--store", str(workspace.store.root)]) == 0
    assert len(re.findall(r"temperature [\d.]+, from 150 validation examples", capsys.readouterr().out)) == len(fitted)
    workspace.export("sure", tmp_path / "peft")
    card = (tmp_path / "peft" / "README.md").read_text()
    for each in fitted.values():
        assert f"{each['temperature']:.4g}" in " ".join(card.split())
    again = Workspace(tmp_path / "again")
    assert again.import_adapter(str(tmp_path / "peft"), "sure").digest == version.digest


def numbers_in(answer: Any, name: str = "") -> dict[str, float]:
    """Every number of an answer by its place in it."""
    if isinstance(answer, dict):
        return {key: value for k, each in answer.items() for key, value in numbers_in(each, f"{name}.{k}").items()}
    if isinstance(answer, list):
        return {key: value for n, each in enumerate(answer) for key, value in numbers_in(each, f"{name}.{n}").items()}
    return {name: answer} if isinstance(answer, float) else {}


def test_evaluate_prints_what_is_wrong_and_writes_a_table_and_a_page(trained, tmp_path, capsys) -> None:
    errors, page = tmp_path / "errors.csv", tmp_path / "page.html"
    arguments = ["evaluate", "reviews", str(trained.data), *trained.store]
    assert run([*arguments, "--out", str(errors), "--report", str(page)]) == 0
    out = capsys.readouterr().out
    for words in ("precision", "right \\ answered", "ECE", "90% sets hold the right label in", "right is", str(page)):
        assert words in out
    assert run([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"version", "digest", "data", "metrics", "seconds", "notes"} < set(said)
    written = read(errors)
    assert len(written) == said["details"]["wrong"]
    assert list(written[0]) == ["row", "right", "given", "confidence", "score", "text"]
    assert [row["text"] for row in written[:20]] == [each["text"] for each in said["details"]["mistakes"]]
    html = page.read_text(encoding="utf-8")
    for row in written:
        assert row["text"] in html
    for outside in ("<script", "http://", "https://", "@import", "url("):
        assert outside not in html.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert html.count("<svg") == 1
    assert run([*arguments, "--report", str(page), "--no-texts"]) == 0
    assert "number 30" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--out", "errors.xls"], "errors.xls' has no known kind of table: write to a .csv, .tsv, .jsonl, .xlsx file"),
        (["--out", "nowhere/errors.csv"], "its folder does not exist"),
        (["--report", "page.pdf"], "expected a .html file in a folder that exists"),
    ],
)
def test_a_file_that_cannot_be_written_costs_one_line_before_anything_is_loaded(
    trained, options, complaint, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "reviews", str(trained.data), *trained.store, *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predict_keeps_every_column_and_row_and_flags_blank_and_cut_inputs(trained, tmp_path) -> None:
    content = [["1", "a great film", "x\ny"], ["2", "  ", ""], ["3", "dull story " * 40, "z"], ["4", "a dull bank", ""]]
    source = table(tmp_path / "in.csv", ["id", "text", "remark"], content)
    out = tmp_path / "out.csv"
    done = trained.workspace.predict_file("reviews", str(source), out, PredictOptions(top=3, coverage=0.9))
    assert (done.rows, done.blank, done.cut, done.guarded) == (4, 1, 1, 0)
    found = read(out)
    assert [[row["id"], row["text"], row["remark"]] for row in found] == content
    assert [row["row"] for row in found] == ["2", "4", "5", "6"]  # lines of the file: one cell has a line break
    assert [row["flags"] for row in found] == ["", "blank", "cut", ""]
    assert found[1]["predicted"] == found[1]["probability"] == ""
    answers = trained.workspace.predict("reviews", [row[1] for row in content], coverage=0.9)
    for place in (0, 2, 3):
        row, answer = found[place], answers[place]
        assert row["predicted"] == answer["label"]
        assert float(row["probability"]) == pytest.approx(answer["probabilities"][answer["label"]], abs=1e-5)
        assert row["predicted_2"] == ({"good", "bad"} - {answer["label"]}).pop()
        assert row["predicted_3"] == ""  # there are two labels
        assert row["label_set"].split(" | ") == answer["label_set"]


def test_predict_says_which_rows_of_a_table_are_left_out(trained, tmp_path) -> None:
    content = [["1", "a great film"], ["id", "text"], ["2", "a dull bank"], ["Total", ""]]
    done = trained.workspace.predict_file(
        "reviews", str(table(tmp_path / "in.csv", ["id", "text"], content)), tmp_path / "out.csv"
    )
    assert done.rows == 3
    assert any("rows that repeat the names are left out: 1" in note for note in done.notes)


def test_predict_writes_json_lines_and_reads_lines_of_text(trained, tmp_path) -> None:
    (tmp_path / "in.txt").write_text("a great film\n\na dull bank\n")
    done = trained.workspace.predict_file("reviews", str(tmp_path / "in.txt"), tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["row"] for each in found] == [1, 2, 3]
    assert [each["text"] for each in found] == ["a great film", "", "a dull bank"]
    assert found[1]["flags"] == ["blank"]
    assert 0 < found[0]["probability"] <= 1
    assert done.columns == list(found[0])


def test_a_workbook_is_answered_in_a_workbook_with_numbers_dates_and_texts(trained, tmp_path) -> None:
    book, when = openpyxl.Workbook(), datetime(2026, 10, 3)
    heads = ["Nr", "text", "Preis", "am"]
    rows = [heads, [7, "a great film", 2.5, when], [8, "=dull story", None, None], [9, None, 1, None]]
    for row in rows:
        book.active.append(row)
    book.active["B3"].data_type = "s"  # a text that begins like a formula
    book.save(tmp_path / "Oktober.xlsx")
    out = tmp_path / "answers.xlsx"
    done = trained.workspace.predict_file("reviews", str(tmp_path / "Oktober.xlsx"), out)
    names, *found = openpyxl.load_workbook(out).active.iter_rows()
    assert [cell.value for cell in names] == ["Nr", "text", "Preis", "am", "row", "predicted", "probability", "flags"]
    assert [[cell.value for cell in row[:3]] for row in found] == [row[:3] for row in rows[1:]]
    assert [row[1].data_type for row in found] == ["s", "s", "n"]
    assert str(found[0][3].value).startswith("2026-10-03")
    chances = [row[6].value for row in found]
    assert all(isinstance(chance, float) and 0.5 <= chance <= 1 for chance in chances[:2])
    assert (found[0][4].value, found[2][7].value, chances[2]) == (2, "blank", None)
    assert (done.guarded, done.blank) == (0, 1)


@pytest.mark.parametrize(
    ("encoding", "preis", "wanted"),
    [("utf-8-sig", "2,50", ","), ("utf-8", "2.50", "."), ("cp1252", "2,50", ","), ("utf-16", "zwei", ".")],
)
def test_a_table_of_text_is_answered_in_its_own_form(trained, tmp_path, encoding, preis, wanted) -> None:
    lines = ["Größe;text;Preis", f"groß;a great film, schön;{preis}", f"klein;a dull bank;{preis}"]
    (tmp_path / "in.csv").write_bytes("\r\n".join([*lines, ""]).encode(encoding))
    trained.workspace.predict_file("reviews", str(tmp_path / "in.csv"), tmp_path / "out.csv")
    written = (tmp_path / "out.csv").read_bytes()
    assert written.startswith(codecs.BOM_UTF8) == (encoding == "utf-8-sig")
    heads, first, _ = written.decode(encoding).splitlines()
    assert heads == "Größe;text;Preis;row;predicted;probability;flags"
    assert first.startswith(f"groß;a great film, schön;{preis};2;")
    assert re.fullmatch(rf"[01]\{wanted}\d+", first.split(";")[5])


def test_answers_that_the_encoding_of_the_table_lacks_make_it_utf_8_with_a_note(tmp_path) -> None:
    with TableWriter(tmp_path / "out.csv", ["a"], TextForm(";", "cp1252")) as table:
        table.write({"a": "schön"})
        table.write({"a": "☃"})
    assert table.encoding == "utf-8-sig"
    assert (tmp_path / "out.csv").read_text(encoding="utf-8-sig").splitlines() == ["a", "schön", "☃"]
    with TableWriter(tmp_path / "own.csv", ["a"], TextForm(";", "cp1252")) as table:
        table.write({"a": "schön"})  # the control
    assert (table.encoding, (tmp_path / "own.csv").read_bytes()) == ("cp1252", b"a\nsch\xf6n\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "own.csv"]


def test_a_workbook_has_no_formula_no_control_character_and_no_cut_cell_without_a_word(tmp_path) -> None:
    evil = ["=1+1", "+cmd|' /C calc'!A0", "@SUM(A1)", "a\x07b", "x" * 40_000]
    with TableWriter(tmp_path / "out.xlsx", ["=a"]) as table:
        for each in [*evil, float("nan"), ["b", "c"], True]:
            table.write({"=a": each})
    cells = [row[0] for row in openpyxl.load_workbook(tmp_path / "out.xlsx").active.iter_rows()]
    assert {cell.data_type for cell in cells[: len(evil) + 1]} == {"s"}
    assert [cell.value for cell in cells] == ["=a", *evil[:3], "ab", "x" * 32_767, None, "b | c", True]
    assert table.shortened == 1
    with pytest.raises(RuntimeError), TableWriter(tmp_path / "out.xlsx", ["b"]):
        raise RuntimeError
    assert openpyxl.load_workbook(tmp_path / "out.xlsx").active["A1"].value == "=a"
    assert [path.name for path in tmp_path.iterdir()] == ["out.xlsx"]


def test_a_column_of_the_table_is_never_overwritten(trained, tmp_path) -> None:
    source = table(tmp_path / "in.csv", ["row", "text", "predicted"], [["a", "a great film", "mine"]])
    trained.workspace.predict_file("reviews", str(source), tmp_path / "out.csv")
    (found,) = read(tmp_path / "out.csv")
    assert (found["row"], found["predicted"], found["turret_row"]) == ("a", "mine", "2")
    assert found["turret_predicted"] in ("good", "bad")


def test_a_prediction_that_fails_leaves_the_file_that_was_there(trained, tmp_path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("precious")
    (tmp_path / "in.csv").write_text("text,id\na great film,1\nbroken\n")
    with pytest.raises(DataError, match="line 3 has 1 field and"):
        trained.workspace.predict_file("reviews", str(tmp_path / "in.csv"), out)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_predict_on_the_screen_shows_the_most_probable_labels_and_sets(trained, capsys) -> None:
    arguments = ["predict", "reviews", "a great film", "--top", "2", "--coverage", "0.9", *trained.store]
    assert run(arguments) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.match(r"(good|bad) [\d.]+  (good|bad) [\d.]+ ", first)
    assert second.strip().startswith("90% set ")
    assert run([*arguments, "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert set(said) == {"label", "probabilities", "label_set", "top"}
    assert [each["probability"] for each in said["top"]] == sorted(said["probabilities"].values(), reverse=True)


def test_a_file_that_is_no_table_is_not_taken_for_a_text(trained, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("a great film")
    (tmp_path / "great").mkdir()
    (tmp_path / "in.csv").write_text("text\na great film\n")
    for inputs, complaint in (
        (["notes.md"], "'notes.md' is a file that is no table, and it is not read as a text"),
        (["great"], "'great' is a folder, and it is not read as a text"),
        (["a great film", "in.csv"], "'in.csv' is a file between other inputs"),
        (["a great film", "--out", "out.csv"], "--out writes the answers to the rows of one table"),
    ):
        assert run(["predict", "reviews", *inputs, *trained.store]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert complaint in err
        assert err.count("\n") == 1
    assert run(["predict", "reviews", "notes", *trained.store]) == 0  # the control: a word that names no file


def test_a_misspelt_file_is_not_taken_for_a_text(trained, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "Oktober.xlsx").write_text("not read here")
    (tmp_path / "data" / "first reviews.csv").write_text("text\na great film\n")
    remedy = "For the text itself put -- in front of it"
    for inputs, complaint in (
        (["Oktober.xslx"], f"there is no file 'Oktober.xslx': did you mean 'Oktober.xlsx'? {remedy}"),
        (["a great film", "Oktober.xslx"], "did you mean 'Oktober.xlsx'?"),
        (["data/first review.csv"], "did you mean 'data/first reviews.csv'?"),
        (["November.ods"], "there is no file 'November.ods': give a file, or"),
        (["data/none"], "there is no file 'data/none': give a file, or"),
        (["a great film", "--out", "Oktober.xslx"], "--out writes the answers"),
        (["Oktober.xslx", "--out", "out.csv"], "did you mean 'Oktober.xlsx'?"),
    ):
        assert run(["predict", "reviews", *inputs, *trained.store]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert complaint in err
        assert err.count("\n") == 1
    texts = ["Oktober.xslx", "Oktober.xlsx", "good.csv/bad.csv"]
    assert run(["predict", "reviews", *trained.store, "--", *texts]) == 0
    assert [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()] == texts
    for text in ("a film in the cinema 1/2", "great.Really", "https://films.example/good", "good/bad and reviews.csv"):
        assert run(["predict", "reviews", text, *trained.store]) == 0  # the controls: texts that only remind of files
        capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--top", "0"], "--top 0: expected 1 or more"),
        (["--coverage", "1"], "coverage 1: expected a number above 0 and below 1"),
        (["--coverage", "0.99"], "coverage 0.99 needs 99 validation examples or more, and this version"),
    ],
)
def test_a_mistake_in_an_option_of_predict_costs_one_line(trained, options, complaint, capsys) -> None:
    assert run(["predict", "reviews", "a great film", *options, *trained.store]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1


# --- what a spreadsheet would run -------------------------------------------------------------------------------------


def test_no_cell_of_a_written_table_begins_like_a_formula(trained, tmp_path) -> None:
    evil = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "＝1+1"]
    numbers = ["-5", "+3.5", "-1e-3", "4"]
    source = table(tmp_path / "in.csv", ["=id", "text"], [[each, f"{each} great film"] for each in [*evil, *numbers]])
    done = trained.workspace.predict_file("reviews", str(source), tmp_path / "out.csv")
    found = read(tmp_path / "out.csv")
    for row in found:
        for cell in [*row, *row.values()]:
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "＝")) or re.fullmatch(r"[+-]?[\d.e-]+", cell)
    assert [row["'=id"] for row in found] == [f"'{each}" for each in evil] + numbers
    assert done.guarded == 1 + 2 * len(evil) + 3  # the head, and the texts of "-5 great film" and the like
    assert "begin like a formula" in done.notes[-1]
    trained.workspace.predict_file("reviews", str(source), tmp_path / "out.jsonl")
    kept = [json.loads(line)["=id"] for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept == [*evil, *numbers]


def test_a_mistake_that_is_a_formula_is_harmless_in_the_table_of_mistakes(trained, tmp_path) -> None:
    text = '=HYPERLINK("http://x","great film")'
    source = table(tmp_path / "in.csv", ["text", "label"], [[text, "bad"], [text, "good"]])
    assert run(["evaluate", "reviews", str(source), "--out", str(tmp_path / "errors.csv"), *trained.store]) == 0
    assert [row["text"] for row in read(tmp_path / "errors.csv")] == [f"'{text}"]


@pytest.mark.parametrize("text", ["", "a", "a=b", " =1", "1", "-1", "+.5", "-1e9", "e", "-0.5 | 2e-3"])
def test_a_harmless_text_stays_as_it_is(text: str) -> None:
    assert escape_formula(text) == text


def test_a_table_writer_keeps_numbers_exact_and_has_no_nan(tmp_path) -> None:
    values: list[Any] = [0.1 + 0.2, -1.5, math.nan, None, True, ["a", "b"]]
    for name in ("x.csv", "x.jsonl"):
        with TableWriter(tmp_path / name, ["a", "b"]) as writer:
            for value in values:
                writer.write({"a": value})
    assert [row["a"] for row in read(tmp_path / "x.csv")] == [
        "0.30000000000000004", "-1.5", "nan", "", "True", "a | b",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["a"] for line in lines] == [0.1 + 0.2, -1.5, None, None, True, ["a", "b"]]


def test_a_table_writer_takes_every_cell_that_a_table_may_have(tmp_path) -> None:
    zoned = datetime(2025, 3, 4, tzinfo=UTC)
    values: list[Any] = ["one\rtwo", "half \ud800", 123_456_789_012_345_678, zoned]
    for name in ("x.csv", "x.jsonl", "x.xlsx"):
        with TableWriter(tmp_path / name, ["a", "b"]) as writer:
            for value in values:
                writer.write({"a": value, "b": "next"})
    again = [
        [cells[0] for _, cells in open_table(tmp_path / name).read(["a"])] for name in ("x.csv", "x.jsonl", "x.xlsx")
    ]
    texts = ["one\rtwo", r"half \ud800", "123456789012345678", str(zoned)]
    assert again[0] == texts
    assert again[1] == [*values[:3], str(zoned)]
    assert again[2] == texts


def test_a_vector_that_begins_with_a_negative_number_is_no_formula(tmp_path) -> None:
    with TableWriter(tmp_path / "x.csv", ["a"]) as writer:
        for value in ([-0.5, 2e-9, -3.0], [-0.5], ["-1", "=1+1"], ["-1 ", "2"]):
            writer.write({"a": value})
    cells = [row["a"] for row in read(tmp_path / "x.csv")]
    assert cells == ["-0.5 | 2e-09 | -3.0", "-0.5", "'-1 | =1+1", "'-1  | 2"]
    assert writer.guarded == 2
