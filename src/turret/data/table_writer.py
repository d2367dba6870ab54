"""Writes a table row by row to a `.csv`, `.tsv`, `.jsonl` or `.xlsx` file that appears only when it is whole.

A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@` as a formula. In CSV and TSV such a text gets a `'` in
front, which spreadsheets do not show; plain numbers stay as they are. JSONL keeps every text, and a workbook marks it
as text. A CSV file that answers another one has its separator, encoding and decimal sign (`form_of`).
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import date, time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from turret.data.table import CellValue, FileFormat
from turret.data.text_file import kind_of, open_bytes
from turret.disk import describe_error, sync
from turret.errors import DataError, quote

if TYPE_CHECKING:
    from openpyxl import Workbook

SUFFIXES = (".csv", ".tsv", ".jsonl", ".xlsx")
STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # of a formula; the last four are full-width
JOINED = " | "  # between the items of a list, in CSV, TSV and workbooks
CELL, ROWS, DIGITS = 32_767, 1_048_576, 15  # of a cell, a sheet and a number that Excel reads: characters, rows, digits
_ONE = r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?"
_NUMBERS = re.compile(rf"{_ONE}( \| {_ONE})*")  # one, or a vector: several, JOINED
_COMMA, _POINT = re.compile(r"[+-]?\d+,\d+"), re.compile(r"[+-]?\d+\.\d+")


@dataclass(frozen=True)
class TextForm:
    """How a CSV or TSV file is written."""

    delimiter: str | None = None  # None: that of the suffix
    encoding: str = "utf-8"  # utf-8-sig has a byte order mark
    decimal_comma: bool = False  # numbers are written as in `0,93`


PLAIN = TextForm()


def form_of(source: str, found: FileFormat, rows: Iterable[Sequence[CellValue]], target: Path) -> TextForm:
    """The form of the file that is answered, if the target is of the same kind.

    Args:
        found: how the source is read.
        rows: its first rows, which show whether its numbers have a decimal comma.
    """
    path = Path(os.path.expanduser(source))
    kind = target.suffix.lower()
    if kind not in (".csv", ".tsv") or not path.is_file() or kind_of(path) != kind:
        return PLAIN
    encoding = found.encoding
    if encoding is None:
        with open_bytes(path) as file:
            encoding = "utf-8-sig" if file.read(3) == codecs.BOM_UTF8 else "utf-8"
    cells = [str(cell).strip() for row in rows for cell in row]
    comma = any(map(_COMMA.fullmatch, cells)) and not any(map(_POINT.fullmatch, cells)) and found.delimiter is not None
    return TextForm(found.delimiter, encoding, comma)


def escape_formula(text: str) -> str:
    """The text, with a `'` in front if a spreadsheet would run it as a formula."""
    return f"'{text}" if text.startswith(STARTS) and not _NUMBERS.fullmatch(text) else text


def check_target(path: Path) -> None:
    """Raise DataError unless a table can be written there."""
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{quote(path.name)} has no known kind of table: write to a {', '.join(SUFFIXES)} file")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(f"{quote(str(path), 100)} cannot be written: its folder does not exist, or it is one itself")


class TableWriter:
    """A context manager. After an error in its block nothing is left, and a file that was there stays.

    Args:
        path: the file, which is replaced at the end of the block.
        columns: the keys of every row.
        form: of a CSV or TSV file. If its encoding lacks a letter, the file is UTF-8 with a byte order mark instead.
    """

    def __init__(self, path: Path, columns: Sequence[str], form: TextForm = PLAIN) -> None:
        check_target(path)
        self.path, self.columns, self.form = path, tuple(columns), form
        self.guarded = 0  # cells that got a ' in front
        self.shortened = 0  # cells that a workbook cannot hold whole
        self.encoding = form.encoding  # at the end, that of the file
        self._kind = path.suffix.lower()
        self._partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        self._file: IO[str] | None = None
        self._book: Workbook | None = None
        self._written = 0  # rows of the workbook

    def __enter__(self) -> TableWriter:
        try:
            if self._kind == ".xlsx":
                from openpyxl import Workbook

                self._partial.touch(exist_ok=False)  # before the answers are computed
                self._book = Workbook(write_only=True)
                self._book.create_sheet("answers")
                self._append(self.columns)
                return self
            self._file = self._partial.open("x", encoding="utf-8", errors="backslashreplace", newline="")
        except OSError as error:
            raise self._writing_error(error) from None
        if self._kind != ".jsonl":
            delimiter = self.form.delimiter or ("\t" if self._kind == ".tsv" else ",")
            write = partial(csv.writer, self._file, delimiter=delimiter, lineterminator="\n")
            self._rows, self._quoted = write(), write(quoting=csv.QUOTE_ALL)
            self._rows.writerow([self._cell(name) for name in self.columns])
        return self

    def write(self, row: Mapping[str, CellValue]) -> None:
        """Write one row; a column that it lacks is empty."""
        values = [row.get(name) for name in self.columns]
        try:
            if self._book is not None:
                self._append(values)
            elif self._kind == ".jsonl":
                assert self._file is not None
                line = dict(zip(self.columns, map(_plain, values), strict=True))
                self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False, default=str) + "\n")
            else:
                cells = [self._cell(value) for value in values]
                # before Python 3.13 a cell with a carriage return alone gets no quotes
                (self._quoted if any("\r" in cell for cell in cells) else self._rows).writerow(cells)
        except OSError as error:
            raise self._writing_error(error) from None

    def _cell(self, value: CellValue) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return repr(value).replace(".", ",") if self.form.decimal_comma else repr(value)
        text = _text(value)
        safe = escape_formula(text)
        self.guarded += safe != text
        return safe

    def _append(self, values: Iterable[CellValue]) -> None:
        """Write a row of the workbook: what it keeps as it is, and everything else as text."""
        from openpyxl.cell import WriteOnlyCell
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE  # what no workbook may have

        assert self._book is not None
        sheet = self._book.worksheets[0]
        self._written += 1
        if self._written > ROWS:
            raise DataError(
                f"{quote(self.path.name)} would have over {ROWS:,} rows, which Excel cannot read: write .csv"
            )
        cells = []
        for value in values:
            if _fits_workbook(value):
                cells.append(WriteOnlyCell(sheet, _plain(value)))
                continue
            text = str(ILLEGAL_CHARACTERS_RE.sub("", _text(value).encode(errors="backslashreplace").decode()))
            self.shortened += len(text) > CELL
            cells.append(WriteOnlyCell(sheet, text[:CELL]))
            cells[-1].data_type = "s"  # never a formula
        sheet.append(cells)

    def _writing_error(self, error: OSError) -> DataError:
        return DataError(f"{quote(self.path.name)} was not written: {describe_error(error, self.path)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._file is not None:
                self._file.close()
            if self._book is not None:
                with nullcontext() if kind is None else suppress(OSError):
                    self._book.save(self._partial)  # after an error too: it removes the library's own files
            if kind is None:
                if self._book is None and self.encoding != "utf-8":
                    self._encode()
                sync(self._partial)
                os.replace(self._partial, self.path)
        except OSError as problem:
            raise self._writing_error(problem) from None
        finally:
            self._partial.unlink(missing_ok=True)

    def _encode(self) -> None:
        """Write the file in the encoding of its form, or in UTF-8 if that has not all its letters."""
        beside = self._partial.with_name(f"{self._partial.name}.encoded")
        try:
            with self._partial.open(encoding="utf-8", newline="") as given:
                try:
                    for line in given:
                        line.encode(self.encoding)
                except UnicodeEncodeError:
                    self.encoding = "utf-8-sig"
                given.seek(0)
                with beside.open("w", encoding=self.encoding, newline="") as written:
                    shutil.copyfileobj(given, written)
            os.replace(beside, self._partial)
        finally:
            beside.unlink(missing_ok=True)


def _text(value: CellValue) -> str:
    return JOINED.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _fits_workbook(value: CellValue) -> bool:
    """Whether a workbook keeps a value as it is: a number of at most `DIGITS` digits, or a time without a zone."""
    if isinstance(value, int):
        return abs(value) < 10**DIGITS
    return value is None or (isinstance(value, (float, date, time)) and getattr(value, "tzinfo", None) is None)


def _plain(value: CellValue) -> CellValue:
    """NaN and infinity as null, which JSON has, or as an empty cell."""
    return None if isinstance(value, float) and not -1e308 <= value <= 1e308 else value
