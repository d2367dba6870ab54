"""Workbooks as offices make them: which sheet, which row of names, merged cells, sums; and CSV files with titles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from small_tables import load
from table_bytes import PLAIN, excel, rows

from turret.data.dataset import read_rows
from turret.data.sheets import find_names
from turret.data.source import open_source, open_table
from turret.data.table import FileFormat
from turret.errors import DataError
from turret.recipe import Data
from turret.tasks.classify import Classify

NAMES = ("text", "label", "day")
BODY = [(text, label, number) for number, (text, label) in enumerate(rows(PLAIN))]
SUMMARY = [("Channel", "Count"), ("mail", 7), ("phone", 5), ("Total", 12)]


def book(folder: Path, sheets: dict[str, Any], merged: str = "") -> Path:
    path = folder / "book.xlsx"
    path.write_bytes(excel(sheets))
    if merged:
        opened = openpyxl.load_workbook(path)
        for cells in merged.split():
            opened.worksheets[-1].merge_cells(cells)
        opened.save(path)
    return path


# --- which sheet -----------------------------------------------------------------------------------------------------


def test_the_sheet_whose_columns_fit_is_read_and_named_with_the_others(tmp_path: Path) -> None:
    data = load(book(tmp_path, {"Summary": SUMMARY, "Raw": [NAMES, *BODY]}))
    assert len(data.train) + len(data.test) == 12
    assert any("the sheet 'Raw' is read, not 'Summary'; data.sheet names another" in note for note in data.notes)


@pytest.mark.parametrize(
    ("file", "form", "said"),
    [
        ("a.csv", FileFormat(sheet="Raw"), "data.sheet = 'Raw' is not read of a.csv, only of a file with .xlsx"),
        ("a.jsonl", FileFormat(delimiter=";"), "data.delimiter = ';' is not read of a.jsonl"),
        ("book.xlsx", FileFormat(encoding="cp1252"), "data.encoding = 'cp1252' is not read of book.xlsx"),
    ],
)
def test_a_setting_of_another_kind_of_file_is_refused(file: str, form: FileFormat, said: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(excel({"Raw": [NAMES, *BODY]}) if file.endswith("xlsx") else b"{}")
    with pytest.raises(DataError, match=re.escape(said)):
        open_source(str(tmp_path / file), form)


def test_named_columns_choose_the_sheet_that_has_them(tmp_path: Path) -> None:
    other = [("comment", "grade"), *((f"{text} again", label) for text, label, _ in BODY)]
    path = book(tmp_path, {"Raw": [NAMES, *BODY], "Second": other})
    assert load(path).columns == {"text": "text", "label": "label"}
    found = load(path, text="comment", label="grade")
    assert all("again" in example.input for example in found.train)


def test_a_version_finds_the_sheet_that_has_the_columns_it_was_trained_on(tmp_path: Path) -> None:
    other = [("comment", "grade"), *((f"{text} again", label) for text, label, _ in BODY)]
    path = book(tmp_path, {"Raw": [NAMES, *BODY], "Second": other})
    trained = {"text": "comment", "label": "grade"}
    asked = read_rows(Data(source=str(path)), Classify.schema(), trained=trained)
    assert all("again" in str(row.input) for row in asked.read())


def test_a_hidden_sheet_is_read_only_if_it_is_named(tmp_path: Path) -> None:
    path = book(tmp_path, {"Old": [NAMES, *BODY[:6]], "New": [NAMES, *BODY]})
    opened = openpyxl.load_workbook(path)
    opened["Old"].sheet_state = "hidden"
    opened.active = opened["New"]
    opened.save(path)
    assert len(list(open_table(path).read(["text"]))) == 12
    assert len(list(open_table(path, FileFormat(sheet="Old")).read(["text"]))) == 6


def test_an_error_about_columns_names_the_sheet_and_the_others(tmp_path: Path) -> None:
    path = book(tmp_path, {"Summary": SUMMARY, "Raw": [NAMES, *BODY]})
    with pytest.raises(
        DataError, match=r"no column 'label'.*the other sheets are 'Raw': data\.sheet names one"
    ) as caught:
        load(path, sheet="Summary", text="Channel", label="label")
    assert len(str(caught.value)) < 300
    with pytest.raises(DataError, match=r"book\.xlsx, sheet 'Raw' row 14, column 'label'"):
        load(book(tmp_path, {"Summary": SUMMARY, "Raw": [NAMES, *BODY, ("x", 0.5, 1)]}))


# --- which row has the names ------------------------------------------------------------------------------------------


def test_titles_remarks_and_groups_above_the_names_are_no_data(tmp_path: Path) -> None:
    above = [("Feedback of the third quarter",), ("exported", "2025-10-01"), (), ("What", None, "When")]
    path = book(tmp_path, {"Raw": [*above, NAMES, *BODY]}, merged="A1:C1 A4:B4")
    data = load(path)
    assert len(data.train) + len(data.test) == 12
    assert any("row 5 names the columns; data.header_row names another" in note for note in data.notes)


def test_header_row_says_which_row_names_the_columns(tmp_path: Path) -> None:
    path = book(tmp_path, {"Raw": [("a", "b", "c"), NAMES, *BODY]})
    assert open_table(path).columns == ("a", "b", "c")
    assert open_table(path, FileFormat(header_row=2)).columns == NAMES
    assert len(list(open_table(path, FileFormat(header_row=2)).read(["text"]))) == 12
    with pytest.raises(DataError, match=r"row 99 is empty: set data\.header_row"):
        open_table(path, FileFormat(sheet="Raw", header_row=99))
    lines = tmp_path / "t.csv"
    lines.write_text("a,b\ntext,label\nx,good\n")
    assert open_table(lines, FileFormat(header_row=2)).columns == ("text", "label")
    with pytest.raises(DataError, match=r"no row begins in line 9: set data\.header_row"):
        open_table(lines, FileFormat(header_row=9))


def test_a_column_without_a_name_is_said_and_never_guessed(tmp_path: Path) -> None:
    body = [(text, None, label) for text, label, _ in BODY]
    path = book(tmp_path, {"Raw": [("Comment", "Empty"), *body]})
    table = open_table(path)
    assert table.columns == ("Comment", "Empty", "unnamed 3")
    assert any("'unnamed 3' has no name, and is never guessed" in note for note in table.notes)
    with pytest.raises(DataError, match="cannot tell which column the label beside 'Comment' is"):
        load(path, text="Comment")
    assert load(path, text="Comment", label="unnamed 3").labels == ("bad", "good")


@pytest.mark.parametrize(
    ("first", "place"),
    [
        ([["text", "label"], ["a b", "x"], ["c d", "y"]], 0),
        ([["a title"], ["text", "label"], ["a b", "x"], ["c d", "y"]], 1),
        ([["2025", "7"], ["text", "label"], ["a b", "x"], ["c d", "y"]], 1),
        ([["1", "2"], ["good film", "x"], ["bad film", "y"], ["good story", "x"], ["old story", "y"]], 0),
        ([["only one column"], ["a"], ["b"]], 0),
        ([[], []], None),
    ],
)  # fmt: skip
def test_the_row_of_names(first: list[list[str]], place: int | None) -> None:
    assert find_names(first) == place


# --- merged cells and sums --------------------------------------------------------------------------------------------


def test_a_cell_that_is_merged_over_rows_has_its_value_in_each(tmp_path: Path) -> None:
    body = [
        ("good", "a great film 0"),
        (None, "a great film 1"),
        (None, "one more"),
        ("bad", "a dull film"),
        (None, "no"),
    ]
    path = book(tmp_path, {"Raw": [("label", "text"), *body]}, merged="A2:A4 A5:A6")
    assert [cells[0] for _, cells in open_table(path).read(["label"])] == ["good", "good", "good", "bad", "bad"]
    plain = book(tmp_path, {"Raw": [("label", "text"), *body]})  # a control: without merged cells they are missing
    assert [cells[0] for _, cells in open_table(plain).read(["label"])] == ["good", None, None, "bad", None]


@pytest.mark.parametrize("word", ["Summe", "TOTAL:", "Somme", "Totale", "Totaal", "Razem"])
def test_sums_at_the_end_are_left_out_and_counted(word: str, tmp_path: Path) -> None:
    data = load(book(tmp_path, {"Raw": [NAMES, *BODY, (word, None, 66)]}))
    assert len(data.train) + len(data.test) == 12
    assert any("rows of sums at the end are left out: 1" in note for note in data.notes)
    path = tmp_path / "t.csv"
    path.write_text("text;label;day\n" + "".join(f"{a};{b};{c}\n" for a, b, c in BODY) + f"{word};;66\n")
    assert any("rows of sums at the end are left out: 1" in note for note in load(path).notes)


def test_control_a_row_that_begins_with_such_a_word_and_says_something_is_kept(tmp_path: Path) -> None:
    data = load(
        book(tmp_path, {"Raw": [("label", "text", "day"), *((b, a, c) for a, b, c in BODY), ("Total", "so bad", None)]})
    )
    assert not any("sums" in note for note in data.notes)
    assert "Total" in data.labels


def test_a_date_in_a_column_of_texts_is_read_as_a_text_and_counted(tmp_path: Path) -> None:
    from datetime import datetime

    data = load(book(tmp_path, {"Raw": [NAMES, *BODY, (datetime(2025, 3, 4), "good", 1)]}), test=2)
    assert "2025-03-04T00:00:00" in [example.input for example in (*data.train, *data.test)]
    assert any(re.search(r"1 text were a date|were a date", note) for note in data.notes)


# --- rows that are no data, anywhere in a table ----------------------------------------------------------------------


def test_rows_below_the_names_that_describe_the_columns_are_left_out_and_counted(tmp_path: Path) -> None:
    kinds = ("(free text)", "(choice)", "(number)")
    for path in (book(tmp_path, {"Raw": [NAMES, kinds, *BODY]}), csv_of(tmp_path, [NAMES, kinds, *BODY])):
        data = load(path)
        assert set(data.labels) == {label for _, label, _ in BODY}
        assert any("rows below the names that describe the columns are left out: 1" in note for note in data.notes)


@pytest.mark.parametrize(
    "first",
    [
        ("a first text", BODY[0][1], "none"),  # its label recurs
        ("a first text", "fresh", 7),  # its number is one
    ],
)
def test_control_a_first_row_like_the_others_is_data(first: tuple[Any, ...], tmp_path: Path) -> None:
    data = load(csv_of(tmp_path, [NAMES, first, *BODY]), test=2)
    assert len(data.train) + len(data.test) == len(BODY) + 1


def test_control_without_a_column_of_numbers_or_dates_nothing_describes_columns(tmp_path: Path) -> None:
    data = load(csv_of(tmp_path, [NAMES[:2], ("(free text)", "(choice)"), *(row[:2] for row in BODY)]), test=2)
    assert "(choice)" in data.labels


def test_names_that_stand_again_inside_a_table_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [NAMES, *BODY[:6], tuple(name.upper() for name in NAMES), *BODY[6:]]
    for path in (book(tmp_path, {"Raw": lines}), csv_of(tmp_path, lines)):
        data = load(path)
        assert set(data.labels) == {label for _, label, _ in BODY}
        assert any("rows that repeat the names are left out: 1" in note for note in data.notes)


def test_lines_of_remarks_below_a_table_are_left_out_and_other_short_lines_are_errors(tmp_path: Path) -> None:
    path = csv_of(tmp_path, [NAMES, *BODY])
    body = path.read_bytes()
    path.write_bytes(body + b"#---- end of list ----\r\n#exported 2025-10-01\r\n")
    assert any("lines of remarks, which begin with #, are left out: 2" in note for note in load(path).notes)
    path.write_bytes(body + b"end of list\r\n")
    with pytest.raises(DataError, match="has 1 field and the header has 3"):
        load(path)


def test_marks_that_nobody_sees_make_no_other_name_and_no_other_class(tmp_path: Path) -> None:
    seen = [(text, f"\u200f{label}" if number % 2 else f"{label}\u00a0", number) for text, label, number in BODY]
    for path in (book(tmp_path, {"Raw": [("\u200ftext", "label ", "day"), *seen]}), csv_of(tmp_path, [NAMES, *seen])):
        data = load(path)
        assert data.columns == {"text": "text", "label": "label"}
        assert set(data.labels) == {label for _, label, _ in BODY}


def csv_of(folder: Path, lines: list[Any]) -> Path:
    path = folder / "table.csv"
    path.write_text("".join(";".join(map(str, line)) + "\r\n" for line in lines), encoding="utf-8", newline="")
    return path
