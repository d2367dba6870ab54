"""Writes a table row by row to a `.csv`, `.tsv` or `.jsonl` file that appears only when it is whole.

A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@` as a formula. In CSV and TSV such a text gets a `'` in
front, which spreadsheets do not show; plain numbers stay as they are. JSONL keeps every text.
"""

from __future__ import annotations

import csv
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from turret.disk import describe_error
from turret.errors import DataError, shown
from turret.json_types import JsonValue

SUFFIXES = (".csv", ".tsv", ".jsonl")
STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # of a formula; the last four are full-width
JOINED = " | "  # between the items of a list, in CSV and TSV
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def harmless(text: str) -> str:
    """The text, with a `'` in front if a spreadsheet would run it as a formula."""
    return f"'{text}" if text.startswith(STARTS) and not _NUMBER.fullmatch(text) else text


def check_target(path: Path) -> None:
    """Raise DataError unless a table can be written there."""
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{shown(path.name)} has no known kind of table: write to a {', '.join(SUFFIXES)} file")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(f"{shown(str(path), 100)} cannot be written: its folder does not exist, or it is one itself")


class TableWriter:
    """A context manager. After an error in its block nothing is left, and a file that was there stays.

    Args:
        path: the file, which is replaced at the end of the block.
        columns: the keys of every row.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        check_target(path)
        self.path, self.columns = path, tuple(columns)
        self.guarded = 0  # cells that got a ' in front
        self._lines = path.suffix.lower() == ".jsonl"
        self._partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        self._file: TextIO | None = None

    def __enter__(self) -> TableWriter:
        try:
            self._file = self._partial.open("x", encoding="utf-8", newline="")
        except OSError as error:
            raise self._failed(error) from None
        if not self._lines:
            delimiter = "\t" if self.path.suffix.lower() == ".tsv" else ","
            self._rows = csv.writer(self._file, delimiter=delimiter, lineterminator="\n")
            self._rows.writerow([self._cell(name) for name in self.columns])
        return self

    def write(self, row: Mapping[str, JsonValue]) -> None:
        """Write one row; a column that it lacks is empty."""
        assert self._file is not None
        values = [row.get(name) for name in self.columns]
        try:
            if self._lines:
                line = dict(zip(self.columns, map(_plain, values), strict=True))
                self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False, default=str) + "\n")
            else:
                self._rows.writerow([self._cell(value) for value in values])
        except OSError as error:
            raise self._failed(error) from None

    def _cell(self, value: JsonValue) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return repr(value)
        text = JOINED.join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        safe = harmless(text)
        self.guarded += safe != text
        return safe

    def _failed(self, error: OSError) -> DataError:
        return DataError(f"{shown(self.path.name)} was not written: {describe_error(error, self.path)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._partial, self.path)
        except OSError as problem:
            raise self._failed(problem) from None
        finally:
            self._partial.unlink(missing_ok=True)


def _plain(value: JsonValue) -> JsonValue:
    """NaN and infinity as null, which JSON has."""
    return None if isinstance(value, float) and not -1e308 <= value <= 1e308 else value
