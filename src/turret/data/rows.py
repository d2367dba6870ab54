"""The rows of a table with all their cells, for answers that are written next to them; and the places of examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from turret.data import cells
from turret.data.columns import Schema, find_input
from turret.data.examples import Input
from turret.data.layouts import prompt_layout
from turret.data.settings import DataSettings, format_of
from turret.data.source import open_source
from turret.data.splits import test_split
from turret.data.table import CellValue, Table, TableRow
from turret.data.text_file import lines_of
from turret.errors import DataError

LINES = "text"  # the column of a .txt file


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Args:
        place: the line on which it begins, of a text file; else its number, from 1.
        input: what is asked, "" if the cell is empty.
        cells: all of its cells, in the order of the columns.
    """

    place: int
    input: Input
    cells: tuple[CellValue, ...]


@dataclass(frozen=True)
class Rows:
    """A table whose rows are read one after another.

    Args:
        name: for messages.
        columns: all of them.
        read: the rows, from the start.
        notes: for the user.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[], Iterator[Row]]
    notes: tuple[str, ...] = ()


def read_rows(data: DataSettings, schema: Schema, *, trained: Mapping[str, str] | None = None) -> Rows:
    """The rows of a table, or the lines of a `.txt` file. Raises DataError, also while the rows are read.

    Args:
        trained: role -> column of the table that the adapter was trained on.
    """
    path = Path(os.path.expanduser(data.source))
    if path.suffix.lower() == ".txt" and os.path.isfile(path):
        return Rows(path.name, (LINES,), lambda: _lines(path, data.encoding))
    tables = open_source(data.source, format_of(data))
    table = tables[test_split(data, list(tables))]
    return Rows(table.name, table.columns, _reader(data, table, schema, trained), table.notes)


def _reader(
    data: DataSettings, table: Table, schema: Schema, trained: Mapping[str, str] | None
) -> Callable[[], Iterator[Row]]:
    """Reads the rows of a table; a column that is not found is an error before the first row."""
    if schema.conversations:
        layout = prompt_layout(data, table.columns, trained)
        at = [table.columns.index(name) for name in layout.roles.values()]
        return lambda: _rows(table, lambda row, replaced: layout.prompt([row[place] for place in at], replaced))
    place = table.columns.index(find_input(data, table.columns, schema, trained=trained))
    return lambda: _rows(table, lambda row, replaced: cells.text_of(row[place], replaced))


def _lines(path: Path, encoding: str | None) -> Iterator[Row]:
    for place, line in enumerate(lines_of(path, encoding), 1):
        yield Row(place, line, (line,))


def _rows(table: Table, ask: Callable[[tuple[CellValue, ...], cells.Replacements], Input | None]) -> Iterator[Row]:
    replaced = cells.Replacements()
    for place, row in table.read(table.columns):
        try:
            yield Row(place, ask(row, replaced) or "", row)
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
