"""Reads records, whose keys are the columns: JSON, JSONL and Parquet.

- JSONL is streamed. A `.json` file is one value: a list of objects, an object that holds one such list, or an object of
  columns. Either suffix may hold the other format; a note reports it. Objects in cells give columns such as
  `fields.summary`.
- Of Parquet only the requested columns are read, in batches.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from turret.data import text_file
from turret.data.table import (
    JSON_LIMIT,
    ROLES,
    CellValue,
    FileFormat,
    Table,
    TableRow,
    check_columns,
    from_rows,
    reason_of,
)
from turret.data.text_file import name_of
from turret.errors import DataError, one_line, shown
from turret.json_types import JsonObject, Plain

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLED_ROWS = 100  # rows of JSON whose keys are the columns
BAD_LINES = "lines that are not JSON objects"
_BEYOND = "nested too deeply, or a number of thousands of digits"
_DEEPEST = 4  # keys that lead to a cell
_MOST_KEYS = 100  # of an object whose keys are columns; one with more is a mapping
_NAMED = 4  # bad lines that an error names; the others are counted


def open_jsonl(path: Path, form: FileFormat) -> Table:
    """The table in a file with an object on every line. Raises DataError."""
    encoding, note = text_file.find_encoding(path, form.encoding)
    if (table := _listed(path, encoding, form)) is not None:
        return table.with_note(f"{name_of(path)} is one JSON list, and is read as such")
    left_out: Counter[str] = Counter()
    first = islice(_objects(path, encoding, form.skip_bad_lines, left_out), SAMPLED_ROWS)
    paths = _paths([row for _, row in first], form.columns)
    if not paths:
        what = f"{name_of(path)} has no line with a JSON object" if left_out else f"{name_of(path)} is empty"
        raise DataError(f"{what}: give a table with rows")
    check_columns(name_of(path), tuple(paths), "give each its own name")

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        left_out.clear()
        ways = [paths[name] for name in columns]
        for line, row in _objects(path, encoding, form.skip_bad_lines, left_out):
            yield line, tuple(_cell(row, way) for way in ways)

    return Table(name_of(path), tuple(paths), read, found=_found(encoding), left_out=left_out).with_note(note)


def open_json(path: Path, form: FileFormat) -> Table:
    """The table in a file with one JSON value. Raises DataError."""
    if path.suffix.lower() == ".json" and path.stat().st_size > JSON_LIMIT:
        raise DataError(f"{name_of(path)} is over {JSON_LIMIT} bytes, too much for one value: save it as JSONL")
    encoding, note = text_file.find_encoding(path, form.encoding)
    try:
        value = json.loads(text_file.read_text(path, encoding, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # a second value: an object a line
            return open_jsonl(path, form).with_note(f"{name_of(path)} has an object on every line, and is read so")
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else f" ({_BEYOND})"
        raise DataError(f"{name_of(path)} is not JSON{place}: expected a list of objects, or use .jsonl") from None
    return _of_value(path, value, encoding, form).with_note(note)


def _listed(path: Path, encoding: str, form: FileFormat) -> Table | None:
    """The table in a file that is one list; None if it is not."""
    first = next((line.lstrip()[:1] for line in text_file.read_lines(path, encoding, "\n") if line.strip()), "")
    if first != "[" or path.stat().st_size > JSON_LIMIT:
        return None
    try:
        value = json.loads(text_file.read_text(path, encoding, JSON_LIMIT))
    except (ValueError, RecursionError):
        return None
    return _of_value(path, value, encoding, form) if isinstance(value, list) else None


def _found(encoding: str) -> FileFormat:
    return FileFormat(None if encoding == text_file.UTF8 else encoding)


def _objects(path: Path, encoding: str, skip: bool, left_out: Counter[str]) -> Iterator[tuple[int, JsonObject]]:
    """The objects with their lines. Raises DataError, which names the first lines that hold none and counts the others.

    Args:
        skip: count such lines in `left_out` instead.
    """
    bad: list[tuple[int, str]] = []
    count = 0
    for number, line in enumerate(text_file.read_lines(path, encoding, newline="\n"), 1):
        if not line.strip():
            continue
        row = _object(line)
        if isinstance(row, str):
            count += 1
            bad += [(number, row)] if len(bad) < _NAMED else []
        elif skip or not count:
            yield number, row
    if skip and count:
        left_out[BAD_LINES] += count
    elif count:
        first, *others = [f"line {number}{reason}" for number, reason in bad]
        more = f", {', '.join(others)}" if others else ""
        rest = f" and {count - len(bad)} more" if count > len(bad) else ""
        them = "them" if count > 1 else "it"
        raise DataError(
            f"{name_of(path)} {first}{more}{rest}: expected a JSON object on each line; correct {them}, or set "
            f'data.bad_lines = "skip" to leave {them} out'
        )


def _object(line: str) -> JsonObject | str:
    """The object on a line, or what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        if error.pos >= len(line.rstrip()) or error.msg.startswith("Unterminated"):
            return " is not JSON (it is cut off)"
        return f" is not JSON (column {error.colno})"
    except (ValueError, RecursionError):
        return f" is not JSON ({_BEYOND})"
    return row if isinstance(row, dict) else f": expected an object, found {type(row).__name__}"


def _of_value(path: Path, value: Plain, encoding: str, form: FileFormat) -> Table:
    rows: Plain = value
    note = None
    if isinstance(value, dict):
        lists = [key for key, each in value.items() if isinstance(each, list) and _are_objects(each) and each]
        if len(lists) == 1:
            rows, note = value[lists[0]], f"{name_of(path)}: the rows are the list {lists[0]!r}"
        elif (columns := _columns(value)) is not None:
            rows, note = columns, f"{name_of(path)}: an object of columns, read as rows"
    if not isinstance(rows, list) or not _are_objects(rows):
        raise DataError(f"{name_of(path)}: expected a list of objects, found {_shape(rows)}")
    if not rows:
        raise DataError(f"{name_of(path)} has no rows: give a table with rows")
    paths = _paths(rows[:SAMPLED_ROWS], form.columns)
    check_columns(name_of(path), tuple(paths), "give each its own name")
    found = rows
    if any(len(way) > 1 for way in paths.values()):
        found = [{name: _cell(row, way) for name, way in paths.items()} for row in rows]
    return replace(from_rows(name_of(path), tuple(paths), found), found=_found(encoding)).with_note(note)


def _paths(rows: Sequence[Mapping[str, Plain]], asked: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Column -> the keys that lead to its cells. An object in a cell gives a column for each of its keys.

    Args:
        asked: columns that the recipe names, which stay as they are.
    """
    found: dict[str, tuple[str, ...]] = {}

    def walk(objects: Sequence[Mapping[str, Plain]], before: tuple[str, ...]) -> None:
        for key in dict.fromkeys(key for row in objects for key in row):
            way = (*before, key)
            inner = [cell for row in objects if (cell := row.get(key)) is not None]
            open_ = len(way) < _DEEPEST and key not in (() if before else (*ROLES, *asked)) and any(inner)
            if open_ and _are_objects(inner) and len({name for cell in inner for name in cell}) <= _MOST_KEYS:
                walk(inner, way)
            else:
                found.setdefault(".".join(way), way)

    walk(rows, ())
    return found


def _cell(row: Mapping[str, Plain], way: Sequence[str]) -> Plain:
    cell: Plain = row
    for key in way:
        if not isinstance(cell, dict):
            return None
        cell = cell.get(key)
    return cell


def _are_objects(rows: Sequence[Plain]) -> TypeGuard[list[dict[str, Plain]]]:
    return all(isinstance(row, dict) for row in rows)


def _columns(value: Mapping[str, Plain]) -> list[dict[str, Plain]] | None:
    """Rows of an object of equally long columns, which are lists, or objects with the same keys as pandas writes."""
    columns = list(value.values())
    if len(columns) < 2:
        return None
    lists = [each for each in columns if isinstance(each, list)]
    if len(lists) == len(columns) and len({len(each) for each in lists}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
    objects = {name: each for name, each in value.items() if isinstance(each, dict)}
    first = next(iter(objects.values()), {})
    if len(objects) == len(columns) and all(list(each) == list(first) for each in objects.values()):
        return [{name: each[key] for name, each in objects.items()} for key in first]
    return None


def _shape(value: Plain) -> str:
    if isinstance(value, list):
        odd = next(i for i, row in enumerate(value) if not isinstance(row, dict))
        return f"{type(value[odd]).__name__} as item {odd + 1}"
    return type(value).__name__


# --- Parquet ----------------------------------------------------------------------------------------------------------


def open_parquet(path: Path) -> Table:
    """The table in a Parquet file. Raises DataError."""
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        names = tuple(str(name) for name in schema.names)
    except _unreadable() as error:
        if isinstance(error, OSError) and error.errno:  # from the system, not from Parquet
            raise
        raise DataError(f"{name_of(path)} is not Parquet, or broken: {reason_of(error)}: write it again") from None
    check_columns(name_of(path), names, "give each its own name")

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
                f"{name_of(path)} is broken after row {number}: {reason_of(error)}: write it again"
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
            f"({reason_of(error, 60)}): expected text or a label; correct it, or leave the row out"
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
