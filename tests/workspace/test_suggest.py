"""Which rows to label next: the least sure ones, spread over the texts, from tables of any size."""

from __future__ import annotations

import csv
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import small_models

from turret.cli.main import run
from turret.errors import AdapterError, DataError
from turret.recipe import Recipe
from turret.workspace import Workspace
from turret.workspace.predicted_file import TIMES, spread_rows

pytestmark = pytest.mark.slow  # real trainings

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0_1"
GOOD, BAD = ("great film", "a pleasure", "quick and great"), ("dull story", "boring and lazy", "a dull bank")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A classifier that was trained on the columns `review` and `stance`."""
    folder = tmp_path_factory.mktemp("suggest")
    base = small_models.save_base("bert", folder / "bert")
    rows = [f"{(GOOD if n % 2 else BAD)[n // 2 % 3]} {n},{'good' if n % 2 else 'bad'}" for n in range(40)]
    (folder / "reviews.csv").write_text("\n".join(["review,stance", *rows]) + "\n", encoding="utf-8")
    workspace = Workspace(folder / "store")
    data = {"source": str(folder / "reviews.csv"), "text": "review", "label": "stance"}
    train = {"epochs": 3, "lr": 5e-3, "evaluate": "never"}
    workspace.train(Recipe(name="reviews", base=str(base), data=data, task={"max_tokens": 24}, train=train))
    return workspace


def pool(path: Path, count: int = 60, column: str = "review") -> Path:
    """Rows that are surely good or bad, and of each four one of both or neither."""
    doubtful = ("great dull", "a film", "lazy pleasure", "the story of a great dull bank", "film story")
    texts = [doubtful[n % 5] if n % 4 == 0 else (GOOD if n % 2 else BAD)[n % 3] for n in range(count)]
    lines = [json.dumps({column: f"{text} {number}", "id": number}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_rows_are_the_least_sure_ones_and_say_what_the_version_answers(house: Workspace, tmp_path: Path) -> None:
    source = pool(tmp_path / "pool.jsonl", 60)
    found = house.suggest("reviews", source, most=3)
    assert (found.rows, found.blank, found.repeated, len(found.suggestions)) == (60, 0, 0, 3)
    texts = [json.loads(line)["review"] for line in source.read_text().splitlines()]
    answers = house.predict("reviews", texts)
    sure = [max(answer["probabilities"].values()) for answer in answers]
    for each in found.suggestions:
        assert each.texts == (texts[each.row - 1],)
        assert each.predicted == answers[each.row - 1]["label"]
        assert each.confidence == pytest.approx(sure[each.row - 1], abs=1e-6)
    limit = sorted(sure)[TIMES * 3 - 1]
    assert all(each.confidence <= limit + 1e-6 for each in found.suggestions)
    assert [each.confidence for each in found.suggestions] == sorted(each.confidence for each in found.suggestions)
    assert house.suggest("reviews", source, most=3).suggestions == found.suggestions  # the same again
    everything = house.suggest("reviews", source, most=100)  # more than there are: all, the least sure first
    assert sorted(each.row for each in everything.suggestions) == list(range(1, 61))


def test_rows_of_one_cluster_are_not_suggested_together() -> None:
    generator = np.random.default_rng(0)
    centres = np.eye(16)[:5]
    near = np.concatenate([centre + generator.normal(0, 0.01, (20, 16)) for centre in centres]).astype(np.float32)
    margins = np.concatenate([np.full(20, 0.01), np.full(80, 0.2)])  # the first cluster is the least sure
    chosen = spread_rows(near, margins.tolist(), 5)
    assert sorted(place // 20 for place in chosen) == [0, 1, 2, 3, 4]
    by_margin_alone = np.argsort(margins, kind="stable")[:5]  # the control: all of one cluster
    assert {place // 20 for place in by_margin_alone} == {0}
    assert chosen == sorted(chosen, key=lambda place: margins[place])
    # Fewer clusters than rows.
    equal = spread_rows(np.ones((30, 4), dtype=np.float32), np.linspace(0, 1, 30).tolist(), 7)
    assert len(set(equal)) == 7


def test_the_table_to_label_has_the_columns_of_the_training(house: Workspace, tmp_path: Path, capsys) -> None:
    source, out, store = pool(tmp_path / "pool.jsonl"), tmp_path / "label.csv", ["--store", str(house.store.root)]
    assert run(["suggest", "reviews", str(source), "--most", "4", "--out", str(out), *store]) == 0
    said = capsys.readouterr().out
    assert "reviews@1 is least sure of these; 60 rows read" in said
    assert "4 rows to label in" in said
    assert "fill in the column stance" in said
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["row", "review", "stance", "predicted", "confidence"]
    assert {row["stance"] for row in rows} == {""}
    assert run(["suggest", "reviews", str(source), "--most", "4", "--json", *store]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [str(each["row"]) for each in answer["suggestions"]] == [row["row"] for row in rows]
    for row in rows:
        row["stance"] = "good"
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    assert run(["evaluate", "reviews", str(out), *store, "--json"]) == 0  # what was filled in is read as it is


def test_blank_and_repeated_rows_are_left_out_and_counted(house: Workspace, tmp_path: Path) -> None:
    source = tmp_path / "pool.csv"
    source.write_text("review\na great film\n  \na great film\na dull bank\nlazy\nlazy\n")
    found = house.suggest("reviews", source, most=10)
    assert (found.rows, found.blank, found.repeated) == (6, 1, 2)
    assert sorted(each.texts[0] for each in found.suggestions) == ["a dull bank", "a great film", "lazy"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.csv", "", "empty.csv"),
        ("heads.csv", "review\n", "heads.csv"),
        ("other.csv", "id,price\n1,2\n", "name one with --text COLUMN"),
        ("blank.csv", "review,id\n  ,1\n,2\n", "has no text to label"),
    ],
)
def test_a_file_without_texts_costs_one_line(house: Workspace, name, content, complaint, tmp_path, capsys) -> None:
    (tmp_path / name).write_text(content)
    assert run(["suggest", "reviews", str(tmp_path / name), "--store", str(house.store.root)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert complaint in err
    assert len(err) < 300


def test_a_version_without_probabilities_says_what_to_do(house: Workspace, tmp_path: Path, capsys) -> None:
    source, store = pool(tmp_path / "pool.jsonl", 4, "text"), shutil.copytree(FIXTURE, tmp_path / "v0_1") / "store"
    with pytest.raises(AdapterError, match=r"writer@2 has the task generate, whose answers have no probability"):
        Workspace(store).suggest("writer", source)
    assert run(["suggest", "writer", str(source), "--store", str(store)]) == 1
    err = capsys.readouterr().err
    assert "give a version of classify, " in err
    assert (err.count("\n"), len(err) < 300) == (1, True)
    for most in (0, 1001):
        with pytest.raises(DataError, match=rf"--most {most}: expected 1 to 1000"):
            house.suggest("reviews", source, most=most)


def test_a_text_of_a_megabyte_is_answered(house: Workspace, tmp_path: Path) -> None:
    source = tmp_path / "long.jsonl"
    source.write_text("\n".join(json.dumps({"review": "great film " * 95_000 + str(n)}) for n in range(3)) + "\n")
    found = house.suggest("reviews", source, most=2)
    assert len(found.suggestions) == 2
    assert all(len(each.texts[0]) > 1_000_000 for each in found.suggestions)


@pytest.mark.slow
def test_the_texts_of_a_large_table_are_not_kept(house: Workspace, tmp_path: Path) -> None:
    """3,000 rows of 30 kB are 90 MB; what is kept for the 20 rows to choose from is little."""
    source = tmp_path / "large.jsonl"
    with source.open("w") as file:
        file.writelines(json.dumps({"review": f"{n} film " * 4000}) + "\n" for n in range(3000))
    house.suggest("reviews", pool(tmp_path / "first.jsonl"), most=2)  # what is loaded once
    tracemalloc.start()
    try:
        found = house.suggest("reviews", source, most=2)
        peak = tracemalloc.get_traced_memory()[1]
        texts = [json.loads(line)["review"] for line in source.read_text().splitlines()]  # the control
        kept = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.rows == len(texts) == 3000
    assert peak < 60e6 < 90e6 < kept
