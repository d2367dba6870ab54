"""Reads JSON and JSONL: objects whose keys are the columns.

JSONL is streamed. A `.json` file is one value: a list of objects, an object that holds one such list, or an object of
columns. Either suffix may hold the other format; a note reports it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from turret.data import text_file
from turret.data.table import BAD_LINES, JSON_LIMIT, SAMPLED_ROWS, FileFormat, Table, TableRow, check_columns, from_rows
from turret.data.text_file import name_of
from turret.errors import DataError
from turret.json_types import JsonObject, JsonValue

_BEYOND = "nested too deeply, or a number of thousands of digits"
_NAMED = 4  # bad lines that an error names; the others are counted


def open_jsonl(path: Path, form: FileFormat) -> Table:
    """The table in a file with an object on every line. Raises DataError."""
    encoding, note = text_file.find_encoding(path, form.encoding)
    if _first_mark(path, encoding) == "[" and (table := _listed(path, encoding)) is not None:
        return table.with_note(f"{name_of(path)} is one JSON list, and is read as such")
    left_out: Counter[str] = Counter()
    columns: dict[str, None] = {}
    for count, (_, row) in enumerate(_objects(path, encoding, form.skip_bad_lines, left_out), 1):
        columns.update(dict.fromkeys(row))
        if count == SAMPLED_ROWS:
            break
    if not columns:
        what = f"{name_of(path)} has no line with a JSON object" if left_out else f"{name_of(path)} is empty"
        raise DataError(f"{what}: give a table with rows")
    check_columns(name_of(path), tuple(columns), "give each its own name")

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        left_out.clear()
        for line, row in _objects(path, encoding, form.skip_bad_lines, left_out):
            yield line, tuple(row.get(name) for name in columns)

    notes = (note,) if note else ()
    return Table(name_of(path), tuple(columns), read, notes=notes, found=_found(encoding), left_out=left_out)


def open_json(path: Path, form: FileFormat) -> Table:
    """The table in a file with one JSON value. Raises DataError."""
    if path.suffix.lower() == ".json" and path.stat().st_size > JSON_LIMIT:
        raise DataError(f"{name_of(path)} is over {JSON_LIMIT} bytes, too much for one value: save it as JSONL")
    encoding, note = text_file.find_encoding(path, form.encoding)
    try:
        value = json.loads(text_file.text_of(path, encoding, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # a second value: an object a line
            return open_jsonl(path, form).with_note(f"{name_of(path)} has an object on every line, and is read so")
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else f" ({_BEYOND})"
        raise DataError(f"{name_of(path)} is not JSON{place}: expected a list of objects, or use .jsonl") from None
    table = _of_value(path, value, encoding)
    return table.with_note(note) if note else table


def _found(encoding: str) -> FileFormat:
    return FileFormat(None if encoding == text_file.UTF8 else encoding)


def _first_mark(path: Path, encoding: str) -> str:
    return next((line.lstrip()[:1] for line in text_file.lines(path, encoding, "\n") if line.strip()), "")


def _listed(path: Path, encoding: str) -> Table | None:
    """The table in a file that is one list; None if it is not."""
    if path.stat().st_size > JSON_LIMIT:
        return None
    try:
        value = json.loads(text_file.text_of(path, encoding, JSON_LIMIT))
    except (ValueError, RecursionError):
        return None
    return _of_value(path, value, encoding) if isinstance(value, list) else None


def _objects(path: Path, encoding: str, skip: bool, left_out: Counter[str]) -> Iterator[tuple[int, JsonObject]]:
    """The objects with their lines. Raises DataError, which names the first lines that hold none and counts the others.

    Args:
        skip: count such lines in `left_out` instead.
    """
    bad: list[tuple[int, str]] = []
    count = 0
    for number, line in enumerate(text_file.lines(path, encoding, newline="\n"), 1):
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


def _of_value(path: Path, value: JsonValue, encoding: str) -> Table:
    rows, note = value, None
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
    names = tuple(dict.fromkeys(key for row in rows[:SAMPLED_ROWS] for key in row))
    check_columns(name_of(path), names, "give each its own name")
    table = replace(from_rows(name_of(path), names, rows), found=_found(encoding))
    return table.with_note(note) if note else table


def _are_objects(rows: Sequence[JsonValue]) -> bool:
    return all(isinstance(row, dict) for row in rows)


def _columns(value: Mapping[str, JsonValue]) -> list[JsonObject] | None:
    """Rows of an object of equally long columns, which are lists, or objects with the same keys as pandas writes."""
    columns = list(value.values())
    if len(columns) < 2:
        return None
    if all(isinstance(each, list) for each in columns) and len({len(each) for each in columns}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if all(isinstance(each, dict) for each in columns) and all(list(each) == list(columns[0]) for each in columns):
        return [{name: each[key] for name, each in value.items()} for key in columns[0]]
    return None


def _shape(value: JsonValue) -> str:
    if isinstance(value, list):
        odd = next(i for i, row in enumerate(value) if not isinstance(row, dict))
        return f"{type(value[odd]).__name__} as item {odd + 1}"
    return type(value).__name__
