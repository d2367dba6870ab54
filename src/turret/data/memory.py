"""Rows that a program has in memory: a DataFrame, a list of dictionaries, a `datasets.Dataset`, or several by split.

They are written as JSONL into a folder of this process, named by their content. The source of a recipe is then
`rows:<number of rows>:<SHA-256 of the content>`. `Workspace` copies the folder into the store, and brings it from there
in another process. pandas and datasets are recognised by their attributes, so neither is imported.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Protocol, TypeAlias, TypeGuard, runtime_checkable

from turret.data.table import CellValue, check_columns
from turret.disk import place_folder
from turret.errors import DataError, quote
from turret.json_types import JsonObject, JsonValue

_SOURCE = re.compile(r"rows:([0-9]{1,12}):([0-9a-f]{64})", re.ASCII)
_ALONE = "rows"  # the name of the file of a single table; others have the name of their split


@runtime_checkable
class _DataFrame(Protocol):
    """What is used of a DataFrame of pandas."""

    columns: Iterable[CellValue]

    def itertuples(self, index: bool = ..., name: str | None = ...) -> Iterable[tuple[CellValue, ...]]: ...


@runtime_checkable
class _HubDataset(Protocol):
    """What is used of a `datasets.Dataset`."""

    column_names: list[str]
    features: Mapping[str, CellValue]

    def __len__(self) -> int: ...

    def with_format(self, type: str | None = ...) -> _HubDataset: ...

    def iter(self, batch_size: int) -> Iterable[_ArrowTable]: ...


@runtime_checkable
class _ArrowTable(Protocol):
    """What is used of a table of pyarrow."""

    column_names: list[str]

    def to_pylist(self) -> list[JsonObject]: ...


RowsInMemory: TypeAlias = Sequence[Mapping[str, CellValue]] | _DataFrame | _HubDataset | _ArrowTable
Rows: TypeAlias = RowsInMemory | Mapping[str, RowsInMemory]  # of one table, or by split
NamedRows = tuple[list[str], Iterator[tuple[CellValue, ...]]]  # the columns, and the cells of each row


def is_rows(value: object) -> TypeGuard[Rows]:
    """Whether a value is rows in memory, or a mapping of splits to them."""
    if isinstance(value, Mapping):
        return bool(value) and all(_is_table(each) for each in value.values())
    return _is_table(value)


def is_rows_source(source: str) -> bool:
    """Whether a recipe's source names rows that were in memory."""
    return source.startswith("rows:")


def digest_of(source: str) -> str:
    """The digest in such a source. Raises DataError if it is malformed."""
    if (found := _SOURCE.fullmatch(source)) is None:
        raise DataError(f"data.source {quote(source, 100)}: expected rows:<number>:<64 hex digits>, as Turret wrote it")
    return found[2]


def name_of_rows(source: str) -> str:
    """The name of an adapter that is trained on unnamed rows."""
    return f"rows-{digest_of(source)[:8]}"


def short_source(source: str) -> str:
    """A source for people: `300 rows in memory, 870f03fd`; others as they are."""
    found = _SOURCE.fullmatch(source)
    return source if found is None else f"{int(found[1]):,} rows in memory, {found[2][:8]}"


def write_rows(value: Rows) -> str:
    """Write rows into this process's folder, unless they are there, and return the source that names them.

    Raises:
        DataError: there are no rows, or a cell is neither text, a number, a date, a list nor a dictionary.
    """
    tables = value if isinstance(value, Mapping) else {_ALONE: value}
    working = _home() / f"new-{uuid.uuid4().hex}"
    whole, rows = hashlib.sha256(), 0
    try:
        working.mkdir()
        for split, table in tables.items():
            if not re.fullmatch(r"[A-Za-z][\w.-]{0,40}", str(split), re.ASCII):
                raise DataError(f"data has the split {quote(split, 40)}: expected a name such as train or test")
            count, digest = _write(working / f"{split}.jsonl", "the given rows" if table is value else split, table)
            whole.update(f"{split}\n{digest}\n".encode())
            rows += count
        folder = _home() / whole.hexdigest()
        if not folder.exists():
            place_folder(working, folder)
    except OSError as error:
        raise DataError(f"the rows cannot be written to {_home()}: {error.strerror}: free some space there") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return f"rows:{rows}:{whole.hexdigest()}"


def folder_of(source: str) -> Path:
    """The folder of this process for the rows of a source, whether it is there or not."""
    return _home() / digest_of(source)


@functools.cache
def _home() -> Path:
    """The folder of this process. It is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="turret-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_table(value: object) -> TypeGuard[RowsInMemory]:
    if isinstance(value, list):
        return bool(value) and all(isinstance(row, Mapping) for row in value)
    return isinstance(value, (_DataFrame, _HubDataset, _ArrowTable)) and not isinstance(value, type)


def _write(path: Path, name: str, table: RowsInMemory) -> tuple[int, str]:
    """Write one table as JSONL. Returns its number of rows and its digest.

    Args:
        name: for messages.
    """
    columns, rows = _read_rows(table)
    check_columns(name, columns, "give each its own name")
    digest, count = hashlib.sha256(), 0
    with path.open("wb") as file:
        for count, row in enumerate(rows, 1):
            cells = {column: _plain(cell, name, count, column) for column, cell in zip(columns, row, strict=True)}
            line = json.dumps(cells, allow_nan=False, separators=(",", ":")).encode() + b"\n"
            digest.update(line)
            file.write(line)
    if not count or not columns:
        raise DataError(f"{name}: expected rows with columns, given none: check what the table was made from")
    return count, digest.hexdigest()


def _read_rows(table: RowsInMemory) -> NamedRows:
    """The columns and rows of a table."""
    if isinstance(table, list):
        names = list(dict.fromkeys(key for row in table for key in row))
        return [str(name) for name in names], (tuple(row.get(name) for name in names) for row in table)
    if isinstance(table, _DataFrame):
        return [str(name) for name in table.columns], iter(table.itertuples(index=False, name=None))
    if isinstance(table, _HubDataset):
        return list(table.column_names), _of_dataset(table)
    assert isinstance(table, _ArrowTable)
    arrow = table
    return list(arrow.column_names), (tuple(row.values()) for row in arrow.to_pylist())


def _of_dataset(table: _HubDataset) -> Iterator[tuple[CellValue, ...]]:
    """The rows of a `datasets.Dataset`, with names instead of the numbers of classes."""
    classes = class_names(table.features)
    for batch in table.with_format("arrow").iter(batch_size=1000):
        for row in batch.to_pylist():
            yield tuple(_name_classes(cell, classes.get(name)) for name, cell in row.items())


def class_names(features: Mapping[str, CellValue]) -> dict[str, list[str]]:
    """Names of class numbers, by column of classes or of lists of classes, of the features of a `datasets.Dataset`."""
    found = {}
    for column, feature in features.items():
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        if names:
            found[column] = [str(name) for name in names]
    return found


def _name_classes(cell: CellValue, names: list[str] | None) -> CellValue:
    if names is None:
        return cell
    if isinstance(cell, list):
        return [_name_classes(each, names) for each in cell]
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else None  # -1: without a label


def _plain(cell: CellValue, name: str, row: int, column: str) -> JsonValue:
    """A cell as JSON. NaN, NaT and NA are empty cells, as in a file."""
    if cell is None or isinstance(cell, (str, bool, int)):
        return str(cell) if isinstance(cell, str) else cell
    if type(cell).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(cell, float):
        return None if cell != cell else cell if abs(cell) != float("inf") else str(cell)
    if isinstance(cell, (date, time)):  # also a Timestamp of pandas
        return cell.isoformat()
    if isinstance(cell, Decimal):
        return str(cell)
    if isinstance(cell, Mapping):
        return {str(key): _plain(each, name, row, column) for key, each in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_plain(each, name, row, column) for each in cell]
    listed = getattr(cell, "tolist", None)  # arrays and numbers of numpy
    if callable(listed):
        return _plain(listed(), name, row, column)
    raise DataError(
        f"{name} row {row}, column {quote(column, 40)}: expected text, a number, a date, a list or a dictionary, "
        f"given {type(cell).__name__}: convert the column, or drop it"
    )
