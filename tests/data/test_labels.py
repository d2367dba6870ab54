"""Which column is the label, typos and `N/A` as classes, and `data.rename`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import films, load, write_csv, write_jsonl

from turret.data import cells
from turret.data.columns import Profile, profile_table
from turret.data.source import open_table
from turret.data.table import list_columns
from turret.errors import DataError, SeveralLabels
from turret.recipe import Data, Task
from turret.tasks import schemas

WORDS = {"praise": ("lovely", "great", "happy"), "blame": ("broken", "late", "rude"), "ask": ("when", "where", "how")}


def opinions(count: int = 90, **columns: Any) -> list[dict[str, Any]]:
    """Texts that show one of three opinions, with more columns: name -> function of the row's number and opinion."""
    chance, rows = random.Random(0), []
    for number in range(count):
        opinion = list(WORDS)[number % 3]
        words = [
            chance.choice(WORDS[opinion]),
            chance.choice("abcdefgh") * 3,
            chance.choice(WORDS[opinion]),
            str(number),
        ]
        rows.append({"wording": " ".join(words)} | {name: make(number, opinion) for name, make in columns.items()})
    return rows


def seen(path: Path, **named: str) -> Profile:
    data = Data(source=str(path), **named)
    return profile_table(open_table(path), data, schemas(Task()))


# --- which column is the label ----------------------------------------------------------------------------------------


def test_a_column_that_the_text_tells_wins_over_one_that_has_as_few_values(tmp_path: Path) -> None:
    rows = opinions(alpha=lambda number, _: random.Random(number).choice("xyz"), omega=lambda _, opinion: opinion)
    found = seen(write_csv(tmp_path / "t.csv", rows))
    assert found.roles == {"text": "wording", "label": "omega"}
    assert found.kappa is not None
    assert found.kappa > 0.6
    assert [each.column for each in found.candidates] == ["alpha"]
    assert (found.candidates[0].kappa or 0) < 0.25


@pytest.mark.parametrize(
    ("label", "other"),
    [
        ("Overall feeling", "Store"), ("Bereich", "Kanal"), ("Fehlerkategorie", "Filiale"),
        ("Ressenti global", "Magasin"),
        ("Categoría", "Tienda"), ("Sentimento", "Canale"), ("Onderwerp", "Filiaal"), ("Assunto", "Loja"),
        ("Kategoria zgłoszenia", "Oddział"), ("issue_topic", "assignee"),
    ],
)  # fmt: skip
def test_names_decide_where_the_text_tells_both(label: str, other: str, tmp_path: Path) -> None:
    rows = opinions(**{other: lambda _, opinion: opinion[0], label: lambda n, opinion: opinion if n % 9 else "ask"})
    assert seen(write_csv(tmp_path / "t.csv", rows)).roles["label"] == label


def test_two_columns_that_fit_equally_are_asked_about_with_both_commands(tmp_path: Path) -> None:
    rows = opinions(topic=lambda _, opinion: opinion, mood=lambda n, opinion: opinion[:2] if n % 15 else "as")
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(SeveralLabels, match=r"--label topic` or `turret init .*--label mood`") as caught:
        seen(path)
    assert list(caught.value.columns) == ["topic", "mood"]
    assert seen(path, label="mood").roles["label"] == "mood"


def test_control_a_column_that_says_the_same_in_other_words_is_not_asked_about(tmp_path: Path) -> None:
    rows = opinions(topic=lambda _, opinion: opinion, class_number=lambda n, _: n % 3)
    assert seen(write_csv(tmp_path / "t.csv", rows)).roles["label"] == "topic"


def test_a_named_text_is_completed_by_the_label_that_it_tells(tmp_path: Path) -> None:
    rows = opinions(place=lambda number, _: random.Random(number).choice("xyz"), verdict=lambda _, opinion: opinion)
    data = load(write_csv(tmp_path / "t.csv", rows), text="wording")
    assert data.columns == {"text": "wording", "label": "verdict"}
    assert "guessed from the cells: label is column 'verdict'" in data.notes
    assert load(tmp_path / "t.csv", label="place").columns == {"text": "wording", "label": "place"}


def test_the_notes_of_a_plan_name_the_other_columns_with_classes(tmp_path: Path) -> None:
    rows = opinions(place=lambda number, _: random.Random(number).choice("xyz"), verdict=lambda _, opinion: opinion)
    notes = load(write_csv(tmp_path / "t.csv", rows), text="wording", label="verdict").notes
    assert any("label is column 'verdict'; other columns with classes: 'place' ('" in note for note in notes)
    alone = load(write_csv(tmp_path / "u.csv", films()), text="text", label="label").notes
    assert not any("other columns" in note for note in alone)


# --- errors about columns --------------------------------------------------------------------------------------------


def test_an_error_lists_twelve_columns_and_asks_for_the_missing_half_only(tmp_path: Path) -> None:
    row = {f"column number {i:02}": f"v{i}" for i in range(11)} | {"zz": "x"}
    path = write_jsonl(tmp_path / "t.jsonl", [row] * 5)
    with pytest.raises(DataError) as caught:
        load(path, text="zz")
    error = str(caught.value)
    assert len(error) < 300
    assert "beside 'zz'" in error
    assert "add --label COLUMN" in error
    assert "--text" not in error
    assert error.count("'") == 2 * (1 + 12)
    assert " more" not in error


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=40), max_size=20, unique=True))
def test_listed_columns_fit_in_a_line(names: list[str]) -> None:
    assert len(list_columns(names, 140)) < 230
    assert list_columns(names).count(" more") <= 1 + sum(" more" in name for name in names)


# --- typos and no labels ---------------------------------------------------------------------------------------------


def test_a_rare_label_one_letter_from_a_common_one_looks_like_a_typo() -> None:
    counts = {"Rechnung": 40, "Rechnug": 2, "Lieferung": 30, "Leiferung": 1, "Technik": 30}
    assert cells.typos(counts) == {"Rechnug": "Rechnung", "Leiferung": "Lieferung"}
    assert cells.suggest_renames(counts | {"N/A": 3, "k.A.": 1}) == {
        "Rechnug": "Rechnung", "Leiferung": "Lieferung", "N/A": "", "k.A.": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    "counts",
    [
        {"Rechnung": 40, "Rechnug": 30},  # as common
        {"level 1": 40, "level 2": 2},  # digits differ on purpose
        {"yes": 40, "no": 2}, {"cat": 40, "car": 1},  # too short to tell
        {"sport": 50, "politics": 3},
    ],
)  # fmt: skip
def test_control_labels_that_are_meant_do_not_look_like_typos(counts: dict[str, int]) -> None:
    assert cells.typos(counts) == {}


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_the_distance_of_two_texts(first: str, second: str) -> None:
    apart = cells.distance(first, second)
    assert apart == cells.distance(second, first)
    assert (apart == 0) == (first == second)
    assert abs(len(first) - len(second)) <= apart <= max(len(first), len(second))


def test_a_swap_of_neighbours_is_one_step() -> None:
    assert cells.distance("faktura", "fatkura") == 1
    assert cells.distance("rechnung", "rechnug") == 1


def test_rename_gives_typos_the_label_that_is_meant_and_leaves_others_out(tmp_path: Path) -> None:
    labels = ["good", "bad"] * 12 + ["godo", "N/A", "N/A"]
    rows = [{"text": f"film {number}", "label": label} for number, label in enumerate(labels)]
    path = write_csv(tmp_path / "t.csv", rows)
    assert load(path).labels == ("N/A", "bad", "godo", "good")
    data = load(path, rename={"godo": "good", "N/A": ""})
    assert data.labels == ("bad", "good")
    assert len(data.train) + len(data.test) == 25
    assert {"1 row with the label 'godo': read as 'good'", "2 rows with the label 'N/A': left out"} <= set(data.notes)
    with pytest.raises(
        DataError, match=r"data\.rename names the label 'goood', which no row has: the labels are 'N/A'"
    ):
        load(path, rename={"goood": "good"})
    with pytest.raises(DataError, match=r"data\.rename needs classes, and generate has none"):
        load(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "completion": "b"}] * 3), rename={"a": "b"})


def test_rename_takes_the_labels_of_a_list_one_by_one(tmp_path: Path) -> None:
    rows = [{"text": f"film {i}", "label": ["good", "funy"] if i % 2 else ["bad"]} for i in range(20)]
    data = load(write_jsonl(tmp_path / "t.jsonl", rows), multi_label=True, rename={"funy": "funny"})
    assert data.labels == ("bad", "funny", "good")


def test_lists_of_one_label_are_classes_and_an_empty_one_is_missing(tmp_path: Path) -> None:
    rows = [{"text": f"film {i}", "label": [["good"], ["bad"], []][i % 3]} for i in range(24)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    data = load(path)
    assert data.labels == ("bad", "good")
    assert any("8 of 24 rows without 'label' are left out" in note for note in data.notes)
    assert not seen(path).multi_label
    rows[0]["label"] = ["good", "bad"]  # a control: with two labels in a list it is for several labels
    assert seen(write_jsonl(path, rows)).multi_label


# --- lines that cannot be read ---------------------------------------------------------------------------------------


def test_bad_lines_are_skipped_and_counted_if_the_recipe_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", films())
    with path.open("a") as file:
        file.write('{"text": "cut of\n[1]\n{"text": 1,,}\n')
    with pytest.raises(
        DataError, match=r"line 33 is not JSON \(it is cut off\), line 34: .*, line 35 is not JSON"
    ) as caught:
        load(path)
    assert len(str(caught.value)) < 300
    data = load(path, bad_lines="skip")
    assert len(data.train) + len(data.test) == 32
    assert "t.jsonl: lines that are not JSON objects are left out: 3" in data.notes


def test_of_many_bad_lines_an_error_names_four_and_counts_the_others(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", films())
    with path.open("a") as file:
        file.write('{"text": \n' * 50)
    with pytest.raises(DataError, match=r"line 33 .*line 36 .* and 46 more: expected a JSON object on each line"):
        load(path)


def test_rows_with_other_fields_are_skipped_and_counted_if_the_recipe_says_so(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", films())
    with path.open("a") as file:
        file.write("end of the report\r\n")
    with pytest.raises(DataError, match=r'line 34 has 1 field and the header has 2: .*data\.bad_lines = "skip"'):
        load(path)
    assert "t.csv: rows with other fields are left out: 1" in load(path, bad_lines="skip").notes
