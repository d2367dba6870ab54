"""Table files: what is read, and the one-line errors for files that cannot be read."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tables import NEWS, POLES, load, write_csv, write_jsonl

from turret.data.source import open_folder, open_table, split_in
from turret.data.table import FIELD_LIMIT, LINE_LIMIT, FileFormat
from turret.errors import DataError

CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ROWS = st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8)
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def cells(path: Path, *columns: str) -> list[tuple[Any, ...]]:
    table = open_table(path)
    return [row for _, row in table.read(columns or table.columns)]


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@SHARED_FOLDER
@given(rows=ROWS)
def test_what_a_csv_writer_writes_is_read_back_exactly(
    tmp_path: Path, rows: list[tuple[str, str]], suffix: str, delimiter: str, end: str
) -> None:
    path = tmp_path / f"t{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    assert cells(path) == rows


@SHARED_FOLDER
@given(rows=ROWS)
def test_what_a_csv_writer_quotes_only_where_needed_is_read_back_exactly(
    tmp_path: Path, rows: list[tuple[str, str]]
) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("a", "b"), *rows])
    assert cells(put(tmp_path / "t.csv", out.getvalue().encode())) == rows


def test_a_byte_order_mark_crlf_and_line_breaks_in_quotes_are_fine(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbftext,label\r\n"two\r\nlines, ""quoted""",a\r\n\r\nplain,b\r\n'
    assert cells(put(tmp_path / "t.csv", content)) == [('two\r\nlines, "quoted"', "a"), ("plain", "b")]


def test_rows_know_the_line_where_they_start(tmp_path: Path) -> None:
    table = open_table(put(tmp_path / "t.csv", b'a,b\n"1\n2\n3",x\n4,y\n'))
    assert [line for line, _ in table.read(["a"])] == [2, 5]


def test_a_csv_with_semicolons_is_understood_and_said(tmp_path: Path) -> None:
    table = open_table(put(tmp_path / "t.csv", b"text;label\nx, y;1\n"))
    assert table.columns == ("text", "label")
    assert table.notes == ("t.csv: columns are separated by ';'",)


def test_reading_leaves_the_process_wide_field_limit_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    for _ in open_table(write_csv(tmp_path / "t.csv", POLES)).read(["text"]):
        assert csv.field_size_limit() == before
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"a,b\n1,2,3\n", r"line 2 has 3 fields and the header has 2: put texts with ',' in double quotes"),
        (b"a,b\n1,2\n3\n", "line 3 has 1 field and the header has 2"),
        (b'a,b\n1,2\n"open,2\n', "row from line 3: a double quote is opened and never closed"),
        (b'a,b\n"x" y,2\n', "row from line 2: a double quote is out of place"),
        (
            "a,b\näöü,2\n".encode() + b"caf\xe9,3\n",
            r"not UTF-8 \(line 3, byte 0xe9 at position 4\): correct it, or set",
        ),
        (b"a,b\n1,2\n3,\xe2\x82", "not UTF-8"),
    ],
)
def test_a_broken_csv_is_one_line_that_says_where(tmp_path: Path, content: bytes, said: str) -> None:
    path = put(tmp_path / "t.csv", content)
    with pytest.raises(DataError, match=said) as caught:
        cells(path)
    assert "\n" not in str(caught.value)


def test_columns_of_one_name_are_numbered_and_a_note_says_so(tmp_path: Path) -> None:
    table = open_table(put(tmp_path / "t.csv", b"a,b,a\n1,2,3\n"))
    assert table.columns == ("a (1)", "b", "a (2)")
    assert list(table.read(["a (2)", "a (1)"])) == [(2, ("3", "1"))]
    assert any("columns of one name are numbered, such as 'a (1)'" in note for note in table.notes)


def test_a_field_of_fifty_megabytes_on_one_line_is_refused_without_reading_it_all(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        file.write("text,label\nshort,a\n")
        file.writelines("x" * 1_000_000 for _ in range(50))
        file.write(",b\n")
    with pytest.raises(DataError, match=f"t.csv line 3 is longer than {LINE_LIMIT} characters"):
        cells(path)


def test_a_quoted_field_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", b'text,label\n"' + b"word\n" * (FIELD_LIMIT // 5 + 1) + b'",a\n')
    with pytest.raises(DataError, match=f"row from line 2: a field is longer than {FIELD_LIMIT} characters"):
        cells(path)


def test_a_field_over_the_usual_limit_of_the_csv_module_is_read(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", b"text,label\n" + b"x" * 200_000 + b",a\n")
    assert len(cells(path)[0][0]) == 200_000


# --- JSON ------------------------------------------------------------------------------------------------------------


@SHARED_FOLDER
@given(rows=ROWS, ascii_only=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_what_a_json_writer_writes_a_line_is_read_back_exactly(
    tmp_path: Path, rows: list[tuple[str, str]], ascii_only: bool, end: str
) -> None:
    lines = [json.dumps({"a": a, "b": b}, ensure_ascii=ascii_only) + end for a, b in rows]
    assert cells(put(tmp_path / "t.jsonl", "".join(lines).encode())) == rows


def test_a_key_that_some_objects_lack_is_missing_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"a": 1}, {"b": 2, "a": None}])
    assert cells(path, "a", "b") == [(1, None), (None, 2)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n  \n", "is empty"),
        (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: expected an object, found list"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "line 1 is not JSON"),
        (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        (b'{"a": "\xc3\xa4\xc3\xb6\xc3\xbc\xc3\x9f\xc3\xa9\xff"}\n', "not UTF-8"),
    ],
)
def test_a_broken_jsonl_is_one_line_that_says_where(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        cells(put(tmp_path / "t.jsonl", content))
    assert "\n" not in str(caught.value)


def test_objects_in_cells_are_columns_also_where_they_are_missing(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "fields": {"text": "a", "kind": {"name": "Bug"}}, "messages": {"role": "user"}},
        {"id": 2, "fields": {"text": "b", "kind": None}, "messages": None},
        {"id": 3, "fields": None},
    ]
    for path in (write_jsonl(tmp_path / "t.jsonl", rows), tmp_path / "t.json"):
        if path.suffix == ".json":
            path.write_text(json.dumps({"total": 3, "rows": rows}))
        table = open_table(path)
        assert table.columns == ("id", "fields.text", "fields.kind.name", "messages")
        cells = [cells for _, cells in table.read(["fields.text", "fields.kind.name"])]
        assert cells == [("a", "Bug"), ("b", None), (None, None)]
        asked = open_table(path, FileFormat(columns=("fields",)))
        assert "fields" in asked.columns  # control: a recipe may ask for the object itself
    mapping = write_jsonl(tmp_path / "m.jsonl", [{"text": "a", "counts": {f"word {n}": n for n in range(200)}}])
    assert open_table(mapping).columns == ("text", "counts")  # control: an object with many keys is no row of columns


def test_a_json_file_is_a_list_of_objects(tmp_path: Path) -> None:
    path = put(tmp_path / "t.json", json.dumps(POLES).encode())
    assert cells(path) == [(row["text"], row["label"]) for row in POLES]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": []}', "expected a list of objects, found dict"),
        (b'[{"a": 1}, 2]', "expected a list of objects, found int as item 2"),
        (b"[]", "has no rows"),
        (b"[{]", "is not JSON at line 1"),
        (b"[" * 100_000, "is not JSON"),
        (b'["\xc3\xa4\xc3\xb6\xc3\xbc\xc3\x9f\xc3\xa9\xff"]', "not UTF-8"),
    ],
)
def test_a_broken_json_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        cells(put(tmp_path / "t.json", content))


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_is_read_with_only_the_columns_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a", None], "label": [1, 0], "extra": [[1], [2]]}), path)
    assert open_table(path).columns == ("text", "label", "extra")
    assert cells(path, "label", "text") == [(1, "a"), (0, None)]


def test_the_class_names_that_datasets_leaves_in_parquet_are_used(tmp_path: Path) -> None:
    names = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]})
    path = tmp_path / "t.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), path)
    assert load(path, test=1).labels == ("neg", "pos")


def test_a_broken_parquet_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not Parquet") as caught:
        cells(put(tmp_path / "t.parquet", b"PAR1 nothing of the kind PAR1"))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_broken_in_the_middle_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(1000)]}), path, compression="gzip")
    raw = bytearray(path.read_bytes())
    raw[100:400] = b"\0" * 300
    with pytest.raises(DataError, match="is broken after row 0"):
        cells(put(path, bytes(raw)))


# --- kinds of files and folders --------------------------------------------------------------------------------------


def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.xyz has no known kind of table: expected one of .csv, .tsv"):
        open_table(put(tmp_path / "t.xyz", b"x"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".xlsx", ".parquet"])
def test_an_empty_file_of_any_kind_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="is empty: give a table with rows"):
        open_table(put(tmp_path / f"t{suffix}", b""))


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.csv", "train"),
        ("data-TRAIN-00000-of-2.parquet", "train"),
        ("imdb_dev.jsonl", "validation"),
        ("val.csv", "validation"),
        ("valid1.csv", "validation"),
        ("test/part.csv", "test"),
        ("train/test.csv", "test"),
        ("latest.csv", ""),
        ("training_set.csv", "train"),
        ("constraint.csv", ""),
    ],
)
def test_the_split_of_a_file_is_a_word_in_its_name(path: str, split: str) -> None:
    assert split_in(Path(path)) == split


def test_a_folder_gives_its_splits(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", POLES)
    write_jsonl(tmp_path / "dev.jsonl", POLES[:4])
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "test" / "part-0.jsonl", POLES[:3])
    write_jsonl(tmp_path / "test" / "part-1.jsonl", POLES[3:5])
    (tmp_path / ".cache").mkdir()
    write_csv(tmp_path / ".cache" / "train.csv", NEWS)
    (tmp_path / "README.md").write_text("no table")
    data = load(tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [20, 4, 5]
    assert any("2 files" in note and "part-0.jsonl ... part-1.jsonl" in note for note in data.notes)


def test_files_without_a_split_beside_files_with_one_are_left_out_and_said(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", POLES)
    write_csv(tmp_path / "more.csv", NEWS)
    data = load(tmp_path, test=2)
    assert any("more.csv" in note and "left out" in note for note in data.notes)


def test_files_of_one_split_with_different_columns_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", POLES)
    write_csv(tmp_path / "b.csv", NEWS)
    with pytest.raises(DataError, match=r"a.csv and b.csv .* have different columns"):
        open_folder(tmp_path)


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"has no tables: expected files with \.csv"):
        load(tmp_path)


@pytest.mark.slow
def test_a_large_table_is_streamed_so_that_only_the_chosen_rows_are_held(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        file.write("text,label\n")
        file.writelines(f"{'word ' * 400}{i},{i % 2}\n" for i in range(10_000))  # 20 MB
    tracemalloc.start()
    try:
        data = load(path, train=100, test=20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(data.train), len(data.test)) == (100, 20)
    assert peak < 4_000_000


def test_rows_that_are_longer_than_the_names_are_refused_whichever_column_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "a text,good\n" * 12 + "a, text,bad\n" * 3)
    table = open_table(path)
    assert table.columns == ("text", "label", "unnamed 3")
    for columns in (("text", "label"), table.columns):
        with pytest.raises(DataError, match="line 14 has 3 fields and the header has 2, and so have 2 more"):
            list(table.read(columns))
