"""The rows of a table: their inputs, all their cells for answers that are written next to them, and their places."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from turret.data import cells
from turret.data.columns import Schema, find_inputs, prompt_layout
from turret.data.examples import Input, TextPair
from turret.data.source import open_source
from turret.data.splits import test_split
from turret.data.table import DETECTED, CellValue, DataSettings, FileFormat, Table, TableRow, format_of
from turret.data.text_file import lines_of
from turret.errors import DataError

LINES = "text"  # the column of a .txt file
Ask = Callable[[Sequence[CellValue], cells.Replacements], Input | None]  # cells of a row -> its input


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
        asked: those that hold the input.
        read: the rows, from the start.
        notes: for the user.
        found: how the file is read, as far as it had to be found out.
        left_out_notes: a note for each kind of rows that the last reading left out.
    """

    name: str
    columns: tuple[str, ...]
    asked: tuple[str, ...]
    read: Callable[[], Iterator[Row]]
    notes: tuple[str, ...] = ()
    found: FileFormat = DETECTED
    left_out_notes: Callable[[], list[str]] = list


def read_rows(data: DataSettings, schema: Schema, *, trained: Mapping[str, str] | None = None) -> Rows:
    """The rows of a table, or the lines of a `.txt` file. Raises DataError, also while the rows are read.

    Args:
        trained: role -> column of the table that the adapter was trained on.
    """
    return _rows_of(data, schema, trained, whole=True)


def read_inputs(data: DataSettings, schema: Schema, *, trained: Mapping[str, str] | None = None) -> list[Input]:
    """The input of each row of a table ("" if missing), or the lines of a `.txt` file. Raises DataError.

    Args:
        trained: role -> column of the table that the adapter was trained on.
    """
    return [row.input for row in _rows_of(data, schema, trained, whole=False).read()]


def _rows_of(data: DataSettings, schema: Schema, trained: Mapping[str, str] | None, *, whole: bool) -> Rows:
    """The rows. A column that is not found is an error before the first row.

    Args:
        whole: all columns; else only those of the input.
    """
    path = Path(os.path.expanduser(data.source))
    if path.suffix.lower() == ".txt" and os.path.isfile(path):  # Path.is_file raises for a name that is too long
        return Rows(path.name, (LINES,), (LINES,), lambda: _lines(path, data.encoding))
    tables = open_source(data.source, format_of(data, trained))
    table = tables[test_split(data, list(tables))]
    try:
        asked, ask = _question(data, table, schema, trained)
    except DataError as error:
        raise DataError(f"{error}; {table.hint}") if table.hint else error from None
    columns = table.columns if whole else asked
    return Rows(
        table.name,
        columns,
        asked,
        lambda: _rows(table, columns, asked, ask),
        table.notes,
        table.found,
        table.left_out_notes,
    )


def _question(
    data: DataSettings, table: Table, schema: Schema, trained: Mapping[str, str] | None
) -> tuple[tuple[str, ...], Ask]:
    """The columns of the input, and what makes it of their cells."""
    if schema.conversations or schema.converses:
        layout = prompt_layout(data, table.columns, trained)
        return tuple(layout.roles.values()), layout.prompt
    found = find_inputs(data, table.columns, schema, trained=trained)

    def ask(row: Sequence[CellValue], replaced: cells.Replacements) -> Input | None:
        read = {"tokens": cells.words_of}
        every = [read.get(role, cells.text_of)(cell, replaced) for role, cell in zip(found, row, strict=True)]
        texts = [text for text in every if text is not None]
        if len(texts) < len(row):
            return None
        return texts[0] if len(texts) == 1 else TextPair(*texts)

    return tuple(found.values()), ask


def _lines(path: Path, encoding: str | None) -> Iterator[Row]:
    for place, line in enumerate(lines_of(path, encoding), 1):
        yield Row(place, line, (line,))


def _rows(table: Table, columns: tuple[str, ...], asked: tuple[str, ...], ask: Ask) -> Iterator[Row]:
    replaced = cells.Replacements()
    places = [columns.index(name) for name in asked]
    for place, row in table.read(columns):
        try:
            yield Row(place, ask([row[each] for each in places], replaced) or "", row)
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
