"""Reads Excel workbooks (.xlsx): one sheet, a row at a time.

The sheet is the one that a recipe names, else the one whose columns fit: those that are asked for, else a column of
texts and one of classes. Titles above the row of names, empty columns and sums at the end are no data. Cells that are
merged over several rows have their value in each. Formulas give the value that Excel stored. Formats are not read.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from turret.data.profile import ColumnFacts
from turret.data.table import (
    HEADS,
    JSON_LIMIT,
    CellValue,
    FileFormat,
    Table,
    TableRow,
    check_columns,
    column_names,
    describing,
    find_names,
    name_key,
    naming_notes,
    only_data,
    reason_of,
)
from turret.data.text_file import name_of
from turret.errors import DataError, listed, shown

if TYPE_CHECKING:
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

_ERRORS = frozenset(("#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"))  # read as missing
_SAMPLED = 200  # rows of each sheet, from which the sheet and the row of names are chosen
_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s+ref="([A-Z]{1,3})([0-9]{1,7}):[A-Z]{1,3}([0-9]{1,7})"')
_CHUNK = 1 << 20

Merged = Mapping[int, Sequence[tuple[int, int]]]  # first row -> (place of the column, last row) of merged cells


@dataclass(frozen=True)
class _Sheet:
    """One sheet that could be the table."""

    title: str
    hidden: bool
    merged: Merged
    row: int  # that names the columns, from 1
    head: tuple[CellValue, ...]  # that row
    first: int  # row with anything in it
    names: tuple[str, ...]
    places: list[int]
    below: list[tuple[CellValue, ...]]  # the first rows under the names

    def fit(self, wanted: Sequence[str]) -> tuple[float, ...]:
        """How well it suits: has the columns that are asked for, is visible, has texts and classes, has many rows."""
        keys = {name_key(name) for name in self.names}
        has = sum(name_key(name) in keys for name in wanted)
        facts = [ColumnFacts(name) for name in self.names]
        for row in self.below:
            for place, column in zip(self.places, facts, strict=True):
                column.add(row[place] if place < len(row) else None)
        texts = [column for column in facts if column.is_texts]
        classes = [column for column in facts if column.is_classes and column not in texts]
        return has, not self.hidden, bool(texts) + bool(texts and classes), min(len(self.below), 10) // 5


def open_excel(path: Path, form: FileFormat) -> Table:
    """The table in a sheet: the one that `form` names, else the one whose columns fit. Raises DataError."""
    _check_archive(path)
    with _sheets(path) as opened:
        titles = list(opened)
        if form.sheet is not None and form.sheet not in titles:
            raise DataError(
                f"{name_of(path)} has no sheet {shown(form.sheet, 40)}: it has {listed(titles)}; set data.sheet"
            )
        read = opened if form.sheet is None else {form.sheet: opened[form.sheet]}
        found = [sheet for title, each in read.items() if (sheet := _looked_at(path, title, each, form)) is not None]
    if not found:
        where = f"the sheet {shown(form.sheet, 40)} of " if form.sheet else ""
        there = f"; the sheets are {listed(titles, 80)}" if len(titles) > 1 else ""
        raise DataError(f"{where}{name_of(path)} has no table: expected a sheet with column names and rows{there}")
    sheet = max(found, key=lambda each: each.fit(form.columns))  # of equal ones the first
    others = [title for title in titles if title != sheet.title]
    name = f"{name_of(path)}, sheet {sheet.title!r}" if others else name_of(path)
    check_columns(name, sheet.names, "give each its own name")
    notes = []
    if others and form.sheet is None:
        alike = [each.title for each in found if each.names == sheet.names and each is not sheet]
        more = f" (the same columns: {listed(alike, 60)})" if alike else ""
        notes.append(
            f"{name_of(path)}: the sheet {sheet.title!r} is read, not {listed(others, 60)}{more}; "
            "data.sheet names another"
        )
    if sheet.row != sheet.first and form.header_row is None:
        notes.append(f"{name}: row {sheet.row} names the columns; data.header_row names another")
    left_out: Counter[str] = Counter()
    place_of = dict(zip(sheet.names, sheet.places, strict=True))

    def rows(columns: Sequence[str]) -> Iterator[TableRow]:
        left_out.clear()
        places = [place_of[column] for column in columns]
        with _sheets(path) as opened:
            body = _body(opened[sheet.title], sheet)
            for number, cells in only_data(body, sheet.head, len(sheet.names), describing(sheet.below), left_out):
                yield number, tuple(cells[place] if place < len(cells) else None for place in places)

    return Table(
        name,
        sheet.names,
        rows,
        notes=(*notes, *naming_notes(name, sheet.head, sheet.names)),
        unit="row",
        found=FileFormat(
            sheet=sheet.title if others else None, header_row=sheet.row if sheet.row != sheet.first else None
        ),
        hint=f"the other sheets are {listed(others, 80)}: data.sheet names one" if others else "",
        left_out=left_out,
    )


def _looked_at(path: Path, title: str, sheet: ReadOnlyWorksheet, form: FileFormat) -> _Sheet | None:
    """What the first rows of a sheet show; None if it has none."""
    merged = _merged_cells(path, sheet)
    sample = list(islice(_unmerged(_rows(sheet), merged), max(_SAMPLED, (form.header_row or 0) + HEADS)))
    filled = [number for number, row in enumerate(sample, 1) if any(cell is not None for cell in row)]
    if not filled:
        return None
    if form.header_row is not None:
        place = form.header_row - 1
        if form.header_row not in filled:
            if form.sheet is None:  # another sheet may have it
                return None
            raise DataError(f"{name_of(path)}, sheet {title!r}: row {form.header_row} is empty: set data.header_row")
    else:
        found = find_names(sample, form.columns)
        assert found is not None
        place = found
    below = [row for row in sample[place + 1 :] if any(cell is not None for cell in row)]
    names, places = column_names(sample[place], below)
    hidden = sheet.sheet_state != "visible"
    return _Sheet(title, hidden, merged, place + 1, sample[place], filled[0], names, places, below)


@contextmanager
def _sheets(path: Path) -> Iterator[dict[str, ReadOnlyWorksheet]]:
    """The worksheets of a workbook by name, while it is open. Raises DataError if it cannot be read."""
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    broken = (InvalidFileException, zipfile.BadZipFile, LookupError, TypeError, ValueError, AttributeError, SyntaxError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # openpyxl warns of formats and extensions, which are not read
            book = load_workbook(path, read_only=True, data_only=True, keep_links=False)
            try:
                yield {sheet.title: sheet for sheet in book.worksheets}
            finally:
                book.close()
    except broken as error:
        raise DataError(
            f"{name_of(path)} is not an Excel workbook, or broken ({reason_of(error, 80)}): "
            "save it again as .xlsx or .csv"
        ) from None


def _check_archive(path: Path) -> None:
    """Raise DataError if the file is no archive, or would be larger than `JSON_LIMIT` when unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(each.file_size for each in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise DataError(
            f"{name_of(path)} is not an .xlsx workbook: save it as .xlsx or .csv, without a password"
        ) from None
    if size > JSON_LIMIT:
        raise DataError(f"{name_of(path)} unpacks to {size} bytes, the limit is {JSON_LIMIT}: save it as .csv")


def _rows(sheet: ReadOnlyWorksheet) -> Iterator[tuple[CellValue, ...]]:
    """The cells of every row; None for empty cells and for Excel's errors."""
    sheet.reset_dimensions()  # some programs store wrong ones
    for row in sheet.iter_rows(values_only=True):
        yield tuple(None if cell in _ERRORS or cell == "" else cell for cell in row)


def _body(sheet: ReadOnlyWorksheet, found: _Sheet) -> Iterator[TableRow]:
    """The rows under the names that are not empty, with their numbers."""
    for number, cells in enumerate(_unmerged(_rows(sheet), found.merged), 1):
        if number > found.row and any(cell is not None for cell in cells):
            yield number, cells


def _unmerged(rows: Iterator[tuple[CellValue, ...]], merged: Merged) -> Iterator[tuple[CellValue, ...]]:
    """The rows, with the value of cells that are merged over several rows in each of these rows."""
    open_cells: dict[int, tuple[CellValue, int]] = {}  # place of a column -> value, and the last row that has it
    for number, cells in enumerate(rows, 1):
        if open_cells:
            open_cells = {place: each for place, each in open_cells.items() if each[1] >= number}
        for place, last in merged.get(number, ()):
            open_cells[place] = (cells[place] if place < len(cells) else None, last)
        # a row without cells of its own is a blank one, also where merged cells cross it
        if open_cells and any(cell is not None for cell in cells):
            width = max(len(cells), max(open_cells) + 1)
            whole = list(cells) + [None] * (width - len(cells))
            for place, (value, _) in open_cells.items():
                whole[place] = value if whole[place] is None else whole[place]
            cells = tuple(whole)
        yield cells


def _merged_cells(path: Path, sheet: ReadOnlyWorksheet) -> dict[int, list[tuple[int, int]]]:
    """The cells of a sheet that are merged over several rows. openpyxl does not read them without the whole sheet."""
    from openpyxl.utils import column_index_from_string

    found: dict[int, list[tuple[int, int]]] = {}
    with zipfile.ZipFile(path) as archive, archive.open(sheet._worksheet_path) as file:
        rest = b""
        while chunk := file.read(_CHUNK):
            text = rest + chunk
            end = 0
            for match in _MERGED.finditer(text):
                first, last, end = int(match[2]), int(match[3]), match.end()
                if last > first:
                    found.setdefault(first, []).append((column_index_from_string(match[1].decode()) - 1, last))
            rest = text[max(end, len(text) - 100) :]
    return found
