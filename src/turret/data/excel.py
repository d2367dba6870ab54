"""Reads Excel workbooks (.xlsx): one sheet, a row at a time.

The first row with two or more filled cells names the columns, so lines above a table are no problem. Formulas give the
value that Excel stored. A sheet is read without its formats.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from turret.data.table import JSON_LIMIT, CellValue, FileFormat, Table, TableRow, check_columns, reason_of
from turret.data.text_file import name_of
from turret.errors import DataError, listed, shown

if TYPE_CHECKING:
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

_ERRORS = frozenset(("#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"))  # read as missing
_HEADS = 50  # rows in which the header is looked for


def open_excel(path: Path, form: FileFormat) -> Table:
    """The table in a sheet: the one that `form` names, else the first with rows. Raises DataError."""
    _check_archive(path)
    with _sheets(path) as sheets:
        filled = {name: head for name, sheet in sheets.items() if (head := _head(sheet)) is not None}
        names = list(sheets)
    wanted = form.sheet
    if wanted is None:
        wanted = next(iter(filled), None)
    elif wanted not in names:
        raise DataError(f"{name_of(path)} has no sheet {shown(wanted, 40)}: it has {listed(names)}; set data.sheet")
    if wanted is None or wanted not in filled:
        raise DataError(f"{name_of(path)} has no table: expected a sheet with column names and rows")
    row, columns = filled[wanted]
    check_columns(name_of(path), columns, "give each its own name")
    others = [name for name in filled if name != wanted]
    notes = []
    if others and form.sheet is None:
        notes.append(
            f"{name_of(path)}: the sheet {wanted!r} is read, not {listed(others, 60)}; data.sheet names another"
        )

    def read(columns_asked: Sequence[str]) -> Iterator[TableRow]:
        places = [columns.index(name) for name in columns_asked]
        with _sheets(path) as sheets:
            for number, cells in enumerate(_rows(sheets[wanted]), 1):
                if number > row and any(cell is not None for cell in cells):
                    yield number, tuple(cells[place] if place < len(cells) else None for place in places)

    found = FileFormat(sheet=wanted if others else None)
    return Table(name_of(path), columns, read, notes=tuple(notes), unit="row", found=found)


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


def _head(sheet: ReadOnlyWorksheet) -> tuple[int, tuple[str, ...]] | None:
    """The number of the row that names the columns, and the names; None if the sheet has none."""
    alone = None
    for number, cells in enumerate(_rows(sheet), 1):
        filled = [cell for cell in cells if cell is not None]
        width = max((place for place, cell in enumerate(cells, 1) if cell is not None), default=0)
        if filled:
            names = tuple("" if cell is None else str(cell).strip() for cell in cells[:width])
            head = number, tuple(name or f"unnamed {place}" for place, name in enumerate(names, 1))
            if len(filled) > 1:
                return head
            alone = alone or head
        if number == _HEADS:
            break
    return alone
