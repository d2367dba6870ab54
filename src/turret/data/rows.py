"""The rows of a table with all their cells, for answers that are written next to them; and the places of examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from turret.data import cells
from turret.data.columns import Schema, find_input
from turret.data.files import CellValue, Table, TableRow, lines_of
from turret.data.settings import DataSettings
from turret.data.source import open_source
from turret.data.splits import test_split
from turret.errors import DataError

LINES = "text"  # the column of a .txt file


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Args:
        place: the line on which it begins, of a text file; else its number, from 1.
        text: its input, "" if the cell is empty.
        cells: all of its cells, in the order of the columns.
    """

    place: int
    text: str
    cells: tuple[CellValue, ...]


@dataclass(frozen=True)
class Rows:
    """A table whose rows are read one after another.

    Args:
        name: for messages.
        columns: all of them.
        input: the column of the inputs.
        read: the rows, from the start.
        notes: for the user.
    """

    name: str
    columns: tuple[str, ...]
    input: str
    read: Callable[[], Iterator[Row]]
    notes: tuple[str, ...] = ()


def read_rows(data: DataSettings, schema: Schema) -> Rows:
    """The rows of a table, or the lines of a `.txt` file. Raises DataError, also while the rows are read."""
    path = Path(os.path.expanduser(data.source))
    if path.suffix.lower() == ".txt" and os.path.isfile(path):
        return Rows(path.name, (LINES,), LINES, lambda: _lines(path))
    tables = open_source(data.source)
    table = tables[test_split(data, list(tables))]
    column = find_input(data, table.columns, schema)
    return Rows(table.name, table.columns, column, lambda: _rows(table, column), table.notes)


def _lines(path: Path) -> Iterator[Row]:
    for place, line in enumerate(lines_of(path), 1):
        yield Row(place, line, (line,))


def _rows(table: Table, column: str) -> Iterator[Row]:
    at, replaced = table.columns.index(column), cells.Replacements()
    for place, row in table.read(table.columns):
        try:
            yield Row(place, cells.text_of(row[at], replaced) or "", row)
        except DataError as error:
            raise DataError(f"{table.name} {table.unit} {place}: {error}") from None


def numbered(table: Table) -> tuple[Table, Callable[[], int]]:
    """The same table, and a function that gives the place of the row that was read last."""
    last = 0

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        nonlocal last
        for place, row in table.read(columns):
            last = place
            yield place, row

    return replace(table, read=read), lambda: last
