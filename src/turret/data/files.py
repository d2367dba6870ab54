"""Reads table files a row at a time: CSV, TSV, JSONL, JSON and Parquet, and folders of them.

- Text files are UTF-8, with or without a byte order mark. Other bytes are an error that names the line.
- A field has at most `FIELD_LIMIT` characters and a line `LINE_LIMIT`, so memory is bounded for any file.
- CSV and TSV follow RFC 4180: quotes, doubled quotes, commas and line breaks in quotes; LF, CRLF and CR. The first line
  names the columns. A row with another number of fields, or a misplaced quote, is an error.
- All formats are streamed but JSON, which is one value. Of Parquet only the requested columns are read, in batches.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from turret.errors import DataError, listed, one_line, shown
from turret.json_types import JsonObject, JsonValue

if TYPE_CHECKING:
    import pyarrow as pa

FIELD_LIMIT = 10_000_000  # characters; ten long novels
LINE_LIMIT = 32_000_000
JSON_LIMIT = 1_000_000_000  # bytes
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_SAMPLED = 100  # rows of JSON whose keys are the columns
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip

CellValue: TypeAlias = object  # JSON and Parquet hold values of any type; `cells` checks them
TableRow = tuple[int, tuple[CellValue, ...]]  # line or row number, and the cells of the requested columns


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Args:
        name: for messages.
        read: (columns) -> the rows, from the start. It can be called many times.
        classes: names of class numbers, by column.
        notes: for the user.
        unit: what the number of a row counts, for messages.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[TableRow]]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unit: str = "line"


def name_of(path: Path) -> str:
    """The file's name for a message."""
    return one_line(path.name, 60)


def open_table(path: Path) -> Table:
    """The table in a file. Only its columns are read at first. Raises DataError."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{name_of(path)} has no known kind of table: expected one of {', '.join(SUFFIXES)}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{name_of(path)} is empty: give a table with rows")
        if suffix == ".parquet":
            return _parquet(path)
        if suffix == ".json":
            return _json(path)
        return _separated(path, "," if suffix == ".csv" else "\t") if suffix in (".csv", ".tsv") else _jsonl(path)
    except OSError as error:
        raise DataError(f"{name_of(path)} cannot be read: {_reason_of(error)}") from None


# --- text, a line at a time ------------------------------------------------------------------------------------------


def _lines(path: Path, newline: str) -> Iterator[str]:
    """Lines with their ends. No more than one line of bounded length is in memory."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            number = 0
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise DataError(
                        f"{name_of(path)} line {number} is longer than {LINE_LIMIT} characters: {_TOO_LONG}"
                    )
                yield line
    except UnicodeDecodeError:
        raise DataError(f"{name_of(path)} is not UTF-8 ({_bad_place(path)}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{name_of(path)} cannot be read: {_reason_of(error)}") from None


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, without their ends."""
    return [line.rstrip("\r\n") for line in _lines(path, newline="")]


_TOO_LONG = f"a field may have {FIELD_LIMIT}, so shorten it or leave the row out"


def _bad_place(path: Path) -> str:
    """The first line that does not decode. Reads the file again."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(4 * LINE_LIMIT):
            number += 1
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}, byte 0x{line[error.start]:02x} at position {error.start + 1}"
    return "it ends in the middle of a character"


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


def _separated(path: Path, delimiter: str) -> Table:
    header = _header(path, delimiter)
    notes: tuple[str, ...] = ()
    if len(header) == 1:  # the separator is not the one that the suffix stands for
        others = [mark for mark in ",;\t|" if mark in header[0]]
        if others:
            delimiter, header = others[0], _header(path, others[0])
            notes = (f"{name_of(path)}: columns are separated by {delimiter!r}",)
    names = tuple(name.strip() or f"unnamed {i}" for i, name in enumerate(header, 1))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{name_of(path)} has the column {shown(twice[0])} more than once: the first line must name the columns"
        )
    return Table(name_of(path), names, partial(_separated_rows, path, delimiter, names), notes=notes)


def _header(path: Path, delimiter: str) -> list[str]:
    for _, cells in _fields(path, delimiter):
        return cells
    raise DataError(f"{name_of(path)} is empty: give a table with rows")


def _separated_rows(path: Path, delimiter: str, names: tuple[str, ...], columns: Sequence[str]) -> Iterator[TableRow]:
    places = [names.index(name) for name in columns]
    rows = _fields(path, delimiter)
    next(rows)
    for line, cells in rows:
        if len(cells) != len(names):
            raise DataError(
                f"{name_of(path)} line {line} has {len(cells)} fields and the header has {len(names)}: "
                f"put texts with {delimiter!r} in double quotes"
            )
        yield line, tuple(cells[place] for place in places)


def _fields(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of every row that is not blank."""
    reader = csv.reader(_lines(path, newline=""), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        previous = csv.field_size_limit(FIELD_LIMIT)  # the limit is global: set it for one row only
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name_of(path)}, row from line {start}: {_reason(error, delimiter)}") from None
        finally:
            csv.field_size_limit(previous)
        if cells is None:
            return
        if cells:
            yield start, cells


def _reason(error: csv.Error, delimiter: str) -> str:
    text = str(error)
    if "field limit" in text:
        return f"a field is longer than {FIELD_LIMIT} characters, or its closing quote is missing: shorten or close it"
    if "unexpected end" in text:
        return "a double quote is opened and never closed: close it, and write a quote inside a field twice"
    return f'a double quote is out of place ({text}): write a quote inside a quoted field twice, as in "a ""b"""'


# --- JSON ------------------------------------------------------------------------------------------------------------


_BEYOND = "nested too deeply, or a number of thousands of digits"


def _jsonl(path: Path) -> Table:
    columns: dict[str, None] = {}
    for count, (_, row) in enumerate(_objects(path), 1):
        columns.update(dict.fromkeys(row))
        if count == _SAMPLED:
            break
    if not columns:
        raise DataError(f"{name_of(path)} is empty: give a table with rows")

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        for line, row in _objects(path):
            yield line, tuple(row.get(name) for name in columns)

    return Table(name_of(path), tuple(columns), read)


def _objects(path: Path) -> Iterator[tuple[int, JsonObject]]:
    for number, line in enumerate(_lines(path, newline="\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else _BEYOND
            raise DataError(f"{name_of(path)} line {number} is not JSON ({what}): expected one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{name_of(path)} line {number}: expected an object, found {type(row).__name__}")
        yield number, row


def _json(path: Path) -> Table:
    if path.stat().st_size > JSON_LIMIT:
        raise DataError(f"{name_of(path)} is over {JSON_LIMIT} bytes, too much for one value: save it as JSONL")
    try:
        rows = json.loads("".join(_lines_of_json(path)))
    except (ValueError, RecursionError) as error:
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else f" ({_BEYOND})"
        raise DataError(f"{name_of(path)} is not JSON{place}: expected a list of objects, or use .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{name_of(path)}: expected a list of objects, found {_shape(rows)}")
    if not rows:
        raise DataError(f"{name_of(path)} has no rows: give a table with rows")
    columns = tuple(dict.fromkeys(key for row in rows[:_SAMPLED] for key in row))
    return from_rows(name_of(path), columns, rows)


def _lines_of_json(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file.read()
    except UnicodeDecodeError:
        raise DataError(f"{name_of(path)} is not UTF-8 ({_bad_place(path)}): save it as UTF-8") from None


def _shape(value: JsonValue) -> str:
    if isinstance(value, list):
        odd = next(i for i, row in enumerate(value) if not isinstance(row, dict))
        return f"{type(value[odd]).__name__} as item {odd + 1}"
    return type(value).__name__


def from_rows(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, CellValue]]) -> Table:
    """A table of rows in memory."""

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        for number, row in enumerate(rows, 1):
            yield number, tuple(row.get(column) for column in columns)

    return Table(name, tuple(columns), read, unit="row")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Table:
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        names = tuple(str(name) for name in schema.names)
    except _unreadable() as error:
        if isinstance(error, OSError) and error.errno:  # from the system, not from Parquet
            raise
        raise DataError(f"{name_of(path)} is not Parquet, or broken: {_reason_of(error)}: write it again") from None
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{name_of(path)} has the column {shown(twice[0])} more than once: give each its own name")

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=256, columns=list(dict.fromkeys(columns))):
                    cells = [_cells(batch.column(name), name_of(path), name, number) for name in columns]
                    for row in zip(*cells, strict=True):
                        number += 1
                        yield number, row
        except _unreadable() as error:
            raise DataError(
                f"{name_of(path)} is broken after row {number}: {_reason_of(error)}: write it again"
            ) from None

    return Table(name_of(path), names, read, classes=_parquet_classes(schema.metadata), unit="row")


def _unreadable() -> tuple[type[Exception], ...]:
    """The errors of pyarrow for a file that it cannot read, or for a value that Python has no type for."""
    import pyarrow as pa

    return (pa.ArrowException, ArithmeticError, LookupError, OSError, TypeError, ValueError)


def _cells(cells: pa.Array, table: str, column: str, before: int) -> list[CellValue]:
    """The cells of one batch as Python values. before: the number of rows of the earlier batches."""
    try:
        return list(cells.to_pylist())
    except _unreadable() as error:
        row = before + 1 + next((place for place, cell in enumerate(cells) if not _is_readable(cell)), 0)
        raise DataError(
            f"{table} row {row}, column {shown(column, 40)}: this {one_line(str(cells.type), 40)} cannot be read "
            f"({_reason_of(error, 60)}): expected text or a label; correct it, or leave the row out"
        ) from None


def _is_readable(cell: pa.Scalar) -> bool:
    try:
        cell.as_py()
    except _unreadable():
        return False
    return True


def _parquet_classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, Sequence[str]]:
    """Names of class numbers, if `datasets` wrote the file and stored them."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _reason_of(error: Exception, most: int = 120) -> str:
    """The first line of an error's text."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return one_line(lines[0], most) if lines else type(error).__name__


# --- folders ---------------------------------------------------------------------------------------------------------


def open_folder(folder: Path) -> dict[str, Table]:
    """Split -> table. Several files of one split make one table, in the order of their names. Raises DataError."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )  # fmt: skip
    if not paths:
        raise DataError(
            f"the folder {shown(str(folder), 100)} has no tables: expected files with {', '.join(SUFFIXES)}"
        )
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(split_in(path.relative_to(folder)), []).append(path)
    unnamed = groups.pop("", [])
    if not groups:
        return {"": _joined(folder, unnamed)}
    note = ""
    if unnamed:
        note = f"{unnamed[0].name} and {len(unnamed) - 1} more" if len(unnamed) > 1 else unnamed[0].name
        note = f"{note} in {folder.name} left out: no train, validation or test in the name"
    tables = {split: _joined(folder, members) for split, members in groups.items()}
    if note:
        first = next(iter(tables))
        tables[first] = _with_notes(tables[first], note)
    return tables


def split_in(path: Path) -> str:
    """The split in a path: in its file name, else in the nearest folder's name; "" if there is none."""
    for part in reversed(path.with_suffix("").parts):
        for word in re.split(r"[^a-z0-9]+|(?<=[a-z])(?=[0-9])", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


def canonical_split(name: str) -> str:
    """`validation` for `dev` and `val`, and so on. Other names stay as they are."""
    return _SPLIT_WORDS.get(name.lower(), name)


def _joined(folder: Path, paths: Sequence[Path]) -> Table:
    tables = [open_table(path) for path in paths]
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            raise DataError(
                f"{first.name} and {table.name} in {name_of(folder)} have different columns "
                f"({listed(first.columns, 60)} and {listed(table.columns, 60)}): give one file, or make them alike"
            )
    if len(tables) == 1:
        return first

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        for table in tables:
            yield from table.read(columns)

    name = f"{first.name} and {len(tables) - 1} more"
    joined = Table(name, first.columns, read, classes=first.classes, notes=first.notes, unit=first.unit)
    return _with_notes(
        joined, f"{len(tables)} files of {folder.name} are read as one: {first.name} ... {tables[-1].name}"
    )


def _with_notes(table: Table, note: str) -> Table:
    return Table(table.name, table.columns, table.read, table.classes, (*table.notes, note), table.unit)
