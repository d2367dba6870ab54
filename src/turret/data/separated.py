"""Reads CSV and TSV: RFC 4180, with the column separator, the encoding and a missing header found out.

Quotes, doubled quotes, separators and line breaks in quotes; LF, CRLF and CR. A row with another number of fields, or a
misplaced quote, is an error. A first line that looks like data is an error until `data.header` says what it is. Titles
above the names, remarks that begin with #, and sums at the end are no data.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from turret.data import text_file
from turret.data.table import (
    BAD_ROWS,
    FIELD_LIMIT,
    HEADS,
    FileFormat,
    Table,
    TableRow,
    check_columns,
    column_names,
    describing,
    find_names,
    is_empty,
    naming_notes,
    only_data,
)
from turret.data.text_file import name_of
from turret.errors import DataError, NoHeader, counted, listed, shown

SEPARATORS = ",;\t|"
_SAMPLED = 100  # lines from which the separator and a missing header are found out
_SAMPLE_LIMIT = 200_000  # characters
REMARKS = "lines of remarks, which begin with #,"
_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?")


@dataclass(frozen=True)
class _Text:
    """How the lines of one file are read."""

    path: Path
    encoding: str
    skipped: int  # lines before the header: Excel's `sep=;`

    def lines(self) -> Iterator[str]:
        return islice(text_file.lines(self.path, self.encoding, newline=""), self.skipped, None)


def open_separated(path: Path, usual: str, form: FileFormat) -> Table:
    """The table in a CSV or TSV file. Raises DataError.

    Args:
        usual: the separator that the file's suffix stands for.
    """
    encoding, note = text_file.find_encoding(path, form.encoding)
    notes = [note] if note else []
    text = _Text(path, encoding, 0)
    sample = _sample(text)
    delimiter = form.delimiter
    if declared := re.fullmatch(r"sep=(.)", sample[0].strip("\r\n") if sample else "", re.IGNORECASE):
        text, sample = _Text(path, encoding, 1), sample[1:]
        delimiter = delimiter or declared[1]
    if delimiter is None:
        delimiter = _delimiter(sample, usual)
    delimiter = "\t" if delimiter == "\\t" else delimiter  # as a shell passes it
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(f'data.delimiter {shown(delimiter, 20)}: expected one character, such as ";" or "\\t"')
    if delimiter != usual and form.delimiter is None:
        notes.append(f"{name_of(path)}: columns are separated by {delimiter!r}")
    header = form.header is not False
    line, first, below = _row_of_names(text, delimiter, form)
    if not header:
        line, names, places = 0, tuple(f"column {i}" for i in range(1, len(first) + 1)), list(range(len(first)))
    else:
        names, places = column_names(first, below)
    if form.header is None and form.header_row is None and _is_data(first, _parsed(sample, delimiter)[1:]):
        raise NoHeader(
            f"the first line of {name_of(path)} looks like data ({listed(first, 40)}), not like column names: set "
            "data.header = false and name 'column 1', 'column 2'; or data.header = true if they are names"
        )
    check_columns(name_of(path), names, "the first line must name the columns")
    titles = header and line > text.skipped + 1
    if titles and form.header_row is None:
        notes.append(f"{name_of(path)}: line {line} names the columns; data.header_row names another")
    found = FileFormat(
        None if encoding == text_file.UTF8 else encoding,
        None if delimiter == usual else delimiter,
        None if header else False,
        header_row=line if titles else None,
    )
    left_out: Counter[str] = Counter()
    described = describing(below) if header else 0
    place_of = dict(zip(names, places, strict=True))

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        left_out.clear()
        wanted = [place_of[name] for name in columns]
        rows = ((number, tuple(cells)) for number, cells in _fields(text, delimiter) if number > line)
        whole = _whole(rows, text, delimiter, len(first), form.skip_bad_lines, left_out)
        for number, cells in only_data(whole, first if header else (), len(first), described, left_out):
            yield number, tuple(cells[place] for place in wanted)

    notes += naming_notes(name_of(path), first if header else (), names)
    return Table(name_of(path), names, read, notes=tuple(notes), found=found, left_out=left_out)


def _row_of_names(text: _Text, delimiter: str, form: FileFormat) -> tuple[int, list[str], list[list[str]]]:
    """The line of the names, the names, and the first rows below. Raises DataError if there is none."""
    rows: list[tuple[int, list[str]]] = []
    most = max(HEADS * 2, form.header_row or 0)
    try:
        rows += islice(_fields(text, delimiter), most)
    except DataError:  # reading the rows says so; here the first ones are enough
        rows = list(islice(_fields(text, delimiter), 1))
    if not rows:
        raise DataError(f"{name_of(text.path)} is empty: give a table with rows")
    place: int | None = 0
    if form.header_row is not None:
        place = next((i for i, (line, _) in enumerate(rows) if line == form.header_row), None)
        if place is None:
            raise DataError(f"{name_of(text.path)}: no row begins in line {form.header_row}: set data.header_row")
    elif (form.header is None and any(is_empty(cell) for cell in rows[0][1])) or len(rows[0][1]) == 1:
        place = find_names([cells for _, cells in rows], form.columns)
    place = place or 0
    return *rows[place], [cells for _, cells in rows[place + 1 :]]


def _whole(
    rows: Iterator[tuple[int, tuple[str, ...]]],
    text: _Text,
    delimiter: str,
    width: int,
    skip: bool,
    left_out: Counter[str],
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The rows. One with another number of fields is left out and counted, or an error.

    Args:
        skip: leave such rows out.
    """
    for line, cells in rows:
        if len(cells) == width:
            yield line, cells
        elif skip:
            left_out[BAD_ROWS] += 1
        elif len(cells) < width and cells[0].lstrip().startswith("#"):
            left_out[REMARKS] += 1
        else:
            others = sum(len(cells) != width for _, cells in rows)
            more = f", and so have {others} more" if others else ""
            fields = counted(len(cells), "field")
            raise DataError(
                f"{name_of(text.path)} line {line} has {fields} and the header has {width}{more}: "
                f'put texts with {delimiter!r} in double quotes, or set data.bad_lines = "skip"'
            )


def _fields(text: _Text, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of every row that is not blank."""
    reader = csv.reader(text.lines(), delimiter=delimiter, strict=True)
    while True:
        start = text.skipped + reader.line_num + 1
        previous = csv.field_size_limit(FIELD_LIMIT)  # the limit is global: set it for one row only
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name_of(text.path)}, row from line {start}: {_reason(error)}") from None
        finally:
            csv.field_size_limit(previous)
        if cells is None:
            return
        if cells:
            yield start, cells


def _reason(error: csv.Error) -> str:
    text = str(error)
    if "field limit" in text:
        return f"a field is longer than {FIELD_LIMIT} characters, or its closing quote is missing: shorten or close it"
    if "unexpected end" in text:
        return "a double quote is opened and never closed: close it, and write a quote inside a field twice"
    return f'a double quote is out of place ({text}): write a quote inside a quoted field twice, as in "a ""b"""'


# --- what the first lines show ---------------------------------------------------------------------------------------


def _sample(text: _Text) -> list[str]:
    """The first lines of a file that are not blank, of bounded size."""
    sample: list[str] = []
    size = 0
    for line in islice(text.lines(), _SAMPLED):
        size += len(line)
        if sample and size > _SAMPLE_LIMIT:
            break
        if line.strip():
            sample.append(line)
    return sample


def _parsed(sample: Sequence[str], delimiter: str) -> list[list[str]]:
    """The rows of a sample, without the last one, which may be cut; empty if they cannot be parsed."""
    try:
        rows = [cells for cells in csv.reader(sample, delimiter=delimiter) if cells]
    except csv.Error:
        return []
    return rows[:-1] if len(rows) > 2 else rows


def _delimiter(sample: Sequence[str], usual: str) -> str:
    """The separator that gives all sampled rows the same number of fields, and more than one. The usual one wins."""
    parsed = {mark: _parsed(sample, mark) for mark in dict.fromkeys(usual + SEPARATORS)}
    widths = {mark: {len(row) for row in rows} for mark, rows in parsed.items()}
    even = [mark for mark, found in widths.items() if len(found) == 1 and max(found) > 1]
    if even:
        return usual if usual in even else max(even, key=lambda mark: max(widths[mark]))
    if parsed[usual] and len(parsed[usual][0]) == 1:  # go by the header alone, or by most rows under titles
        first = next((mark for mark in SEPARATORS if mark in parsed[usual][0][0]), None)
        return first or max(parsed, key=lambda mark: _share_of_usual_width(parsed[mark]))
    return usual


def _share_of_usual_width(rows: Sequence[Sequence[str]]) -> float:
    """The share of rows that have the most frequent number of fields; 0 if it is below three quarters, or one field."""
    width, count = Counter(map(len, rows)).most_common(1)[0] if rows else (1, 0)
    return count / len(rows) if width > 1 and 4 * count >= 3 * len(rows) else 0.0


_COMMON_NAMES = frozenset((
    "text", "texts", "label", "labels", "class", "category", "id", "title", "name", "prompt", "completion", "document",
    "summary", "question", "answer", "input", "output", "instruction", "response", "source", "target", "sentence",
    "review", "comment", "message", "rating", "score", "sentiment", "topic",
))  # fmt: skip


def _is_data(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row looks like one of the others, and not like names of their columns.

    It does if a cell recurs in its own column, which has few different values, if a number stands above numbers, or if
    every cell is a number, blank or as long as a sentence.
    """
    if len(first) < 2 or not rows or {cell.strip().lower() for cell in first} & _COMMON_NAMES:
        return False
    rows = [row for row in rows if len(row) == len(first)]
    for place, cell in enumerate(first):
        below = Counter(row[place].strip() for row in rows)
        value = cell.strip()
        if len(value) > 1 and below[value] >= 3 and 2 * len(below) <= len(rows):
            return True
        if _NUMBER.fullmatch(value) and below and all(_NUMBER.fullmatch(each) for each in below) and len(first) < 4:
            return True
    words = [cell.split() for cell in first]
    return any(len(each) > 5 for each in words) and all(
        len(each) > 5 or not each or _NUMBER.fullmatch(" ".join(each)) for each in words
    )
