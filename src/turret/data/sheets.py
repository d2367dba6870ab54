"""Reads grids of cells, in which a row of names has to be found: CSV, TSV and Excel workbooks (.xlsx).

Titles above the row of names, rows that describe or repeat the names, remarks that begin with #, and sums at the end
are no data.

- CSV and TSV: RFC 4180, with the column separator, the encoding and a missing header found out. Quotes, doubled quotes,
  separators and line breaks in quotes; LF, CRLF and CR. A row with another number of fields, or a misplaced quote, is
  an error. A first line that looks like data is an error until `data.header` says what it is.
- Excel: one sheet, a row at a time. It is the one that a recipe names, else the one whose columns fit: those that are
  asked for, else a column of texts and one of classes. Cells that are merged over several rows have their value in
  each. Formulas give the value that Excel stored. Formats are not read.
"""

from __future__ import annotations

import csv
import re
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from turret.data import text_file
from turret.data.table import (
    FIELD_LIMIT,
    JSON_LIMIT,
    UNNAMED,
    CellValue,
    ColumnFacts,
    FileFormat,
    Table,
    TableRow,
    check_columns,
    is_empty,
    is_unnamed,
    is_value,
    name_key,
    reason_of,
    trim_text,
    words_in,
)
from turret.data.text_file import name_of
from turret.errors import DataError, NoHeader, count_of, quote, quote_all

if TYPE_CHECKING:
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

HEADS = 50  # rows in which the row of names is looked for
_DESCRIBING = 3  # rows, at most, that describe columns
_VALUES = 8  # numbers or dates that show what a column holds
FOOT = 5  # last rows of a table among which sums are looked for
_SUMS = words_in(
    """sum, total, totals, grand total, subtotal, summe, gesamt, gesamtsumme, insgesamt, zwischensumme, somme,
    total général, sous-total, suma, total general, totale, somma, totale generale, totaal, eindtotaal, som, soma,
    total geral, razem, ogółem, łącznie, suma końcowa, summa, итого, всего"""
)
SUMS, BAD_ROWS = "rows of sums at the end", "rows with other fields"
DESCRIPTIONS, NAMES_AGAIN = "rows below the names that describe the columns", "rows that repeat the names"

# --- the row of names, and rows that are no data ----------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    """The row that names the columns of a grid, and what it names.

    Args:
        row: its line or number in the file, from 1; 0 if no row names the columns.
        cells: of that row; empty if no row names the columns.
        names: of the columns.
        places: of the columns in a row.
        below: the first rows under the names.
    """

    row: int
    cells: Sequence[CellValue]
    names: tuple[str, ...]
    places: Sequence[int]
    below: Sequence[Sequence[CellValue]]

    @classmethod
    def of(cls, row: int, cells: Sequence[CellValue], below: Sequence[Sequence[CellValue]]) -> Heading:
        """The names in a row of names, without empty columns that have no name.

        A column without a name is called "unnamed 3", by its place from 1. Columns of one name are "name (1)",
        "name (2)". A few cells to the right of the names are remarks, and no column.
        """
        names = {place: trim_text(str(cell)) for place, cell in enumerate(cells) if not is_empty(cell)}
        counts = Counter(place for row in below for place, cell in enumerate(row) if not is_empty(cell))
        filled = {place for place, count in counts.items() if place < len(cells) or 10 * count >= len(below)}
        places = sorted(names.keys() | filled)
        times, seen = Counter(names.values()), Counter[str]()
        for place, name in sorted(names.items()):
            seen[name] += 1
            names[place] = f"{name} ({seen[name]})" if times[name] > 1 else name
        return cls(row, cells, tuple(names.get(place, f"{UNNAMED}{place + 1}") for place in places), places, below)

    def table(
        self, name: str, width: int, rows: Callable[[Counter[str]], Iterator[TableRow]], notes: Sequence[str]
    ) -> Table:
        """The table of the rows under the names.

        Args:
            width: number of columns; a row of sums leaves some of them empty.
            rows: reads the rows with all their cells, and counts what it leaves out.
        """
        left_out: Counter[str] = Counter()
        place_of = dict(zip(self.names, self.places, strict=True))

        def read(columns: Sequence[str]) -> Iterator[TableRow]:
            left_out.clear()
            wanted = [place_of[column] for column in columns]
            for number, cells in self._only_data(rows(left_out), width, left_out):
                yield number, tuple(cells[place] if place < len(cells) else None for place in wanted)

        return Table(name, self.names, read, notes=(*notes, *self._notes(name)), left_out=left_out)

    def _only_data(self, rows: Iterable[TableRow], width: int, left_out: Counter[str]) -> Iterator[TableRow]:
        """The rows with all their cells, without those that are no data, which `left_out` counts.

        These describe the columns, right below the names; repeat the names, as at the top of every printed page and in
        files that were put together; or are sums among the last rows, which leave some columns empty.
        """
        described = count_descriptions(self.below) if self.cells else 0
        keys = [None if is_empty(cell) else name_key(str(cell)) for cell in self.cells]
        named = [place for place, key in enumerate(keys) if key is not None]
        held: deque[TableRow] = deque()
        for count, row in enumerate(rows):
            if count < described:
                left_out[DESCRIPTIONS] += 1
            elif len(named) > 1 and all(_is_name(row[1], place, keys[place]) for place in named):
                left_out[NAMES_AGAIN] += 1
            else:
                held.append(row)
                if len(held) > FOOT:
                    yield held.popleft()
        for number, cells in held:
            if _is_sum(cells[:width], width):
                left_out[SUMS] += 1
            else:
                yield number, cells

    def _notes(self, table: str) -> list[str]:
        """Notes on columns that have no name, or the name of another one."""
        unnamed = [name for name in self.names if is_unnamed(name)]
        found = [f"{table}: {unnamed[0]!r} has no name, and is never guessed"] if unnamed else []
        times = Counter(trim_text(str(cell)) for cell in self.cells if not is_empty(cell))
        if alike := [name for name, count in times.items() if count > 1]:
            found.append(
                f"{table}: columns of one name are numbered, such as {f'{alike[0]} (1)'!r} and {f'{alike[0]} (2)'!r}"
            )
        return found


def find_names(rows: Sequence[Sequence[CellValue]], wanted: Sequence[str] = ()) -> int | None:
    """The place of the row that names the columns, under titles and remarks; None if no row can.

    The names are different texts, which hardly recur in their columns, and they fill most of the columns that other
    rows fill. Without such a row it is the first one with two filled cells, else the first one with any.

    Args:
        rows: the first rows of a table.
        wanted: columns that the table has.
    """
    keys = {name_key(name) for name in wanted}
    heads = [[str(cell).strip() for cell in row if not is_empty(cell)] for row in rows[:HEADS]]
    if keys and (found := next((i for i, head in enumerate(heads) if keys <= set(map(name_key, head))), None)):
        return found
    widths = [len([cell for cell in row if not is_empty(cell)]) for row in rows]
    usual = median([width for width in widths if width > 1] or [1])
    names = [len(head) > 1 and _are_names(rows, place) for place, head in enumerate(heads)]
    place = next((place for place, head in enumerate(heads) if names[place] and len(head) >= 0.6 * usual), None)
    if place is not None:  # groups of columns have names above their columns' names
        below = place + 1
        return below if below < len(heads) and names[below] and len(heads[below]) > len(heads[place]) else place
    wide = next((place for place, head in enumerate(heads) if len(head) > 1), None)
    return wide if wide is not None else next((place for place, head in enumerate(heads) if head), None)


def _are_names(rows: Sequence[Sequence[CellValue]], own: int) -> bool:
    """Whether a row has different texts, which hardly ever recur in their columns."""
    row = rows[own]
    names = [name_key(str(cell)) for cell in row if not is_empty(cell)]
    if len(set(names)) < len(names) or any(map(is_value, row)):
        return False
    recurs = Counter(
        place
        for number, each in enumerate(rows)
        for place, cell in enumerate(each[: len(row)])
        if number != own and cell == row[place] and not is_empty(cell)
    )
    return not recurs or max(recurs.values()) < max(1, len(rows) // 20)


def _is_name(cells: Sequence[CellValue], place: int, key: str | None) -> bool:
    cell = cells[place] if place < len(cells) else None
    return isinstance(cell, str) and name_key(cell) == key


def count_descriptions(below: Sequence[Sequence[CellValue]]) -> int:
    """How many of the rows right below the names describe the columns, such as the questions of a survey.

    They are texts that do not recur in their columns, and one of them stands above numbers or dates.

    Args:
        below: the first rows under the names.
    """
    rows = [row for row in below if not all(map(is_empty, row))]
    columns: dict[int, list[CellValue]] = {}
    for row in rows[_DESCRIBING:]:
        for place, cell in enumerate(row):
            if not is_empty(cell):
                columns.setdefault(place, []).append(cell)
    values = {
        place
        for place, cells in columns.items()
        if len(cells) >= _VALUES and 10 * sum(map(is_value, cells)) >= 9 * len(cells)
    }
    recurring = {place: {str(cell) for cell in cells} for place, cells in columns.items()}
    count = 0
    for row in rows[:_DESCRIBING]:
        texts = {place: cell for place, cell in enumerate(row) if not is_empty(cell)}
        alone = all(
            isinstance(cell, str) and not is_value(cell) and cell not in recurring.get(place, ())
            for place, cell in texts.items()
        )
        if not alone or not values & texts.keys() or 2 * len(texts) < len(columns):
            break
        count += 1
    return count


def _is_sum(cells: Sequence[CellValue], width: int) -> bool:
    filled = [cell for cell in cells if not is_empty(cell)]
    if not 2 <= len(filled) < width or not isinstance(filled[0], str):
        return False
    return name_key(filled[0]).rstrip(" :") in _SUMS and all(is_value(cell) for cell in filled[1:])


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


SEPARATORS = ",;\t|"
_SAMPLED_LINES = 100  # lines from which the separator and a missing header are found out
_SAMPLE_LIMIT = 200_000  # characters
REMARKS = "lines of remarks, which begin with #,"
_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?")


@dataclass(frozen=True)
class _Separated:
    """How the rows of one CSV or TSV file are read."""

    path: Path
    encoding: str
    delimiter: str
    skipped: int  # lines before the header: Excel's `sep=;`

    def rows(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """(first line, cells) of every row that is not blank."""
        lines = islice(text_file.read_lines(self.path, self.encoding, newline=""), self.skipped, None)
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        while True:
            start = self.skipped + reader.line_num + 1
            previous = csv.field_size_limit(FIELD_LIMIT)  # the limit is global: set it for one row only
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{name_of(self.path)}, row from line {start}: {_reason(error)}") from None
            finally:
                csv.field_size_limit(previous)
            if cells is None:
                return
            if cells:
                yield start, tuple(cells)

    def whole_rows(self, above: int, width: int, left_out: Counter[str], *, skip: bool) -> Iterator[TableRow]:
        """The rows under a line. One with another number of fields is left out and counted, or an error.

        Args:
            skip: leave such rows out.
        """
        rows = ((line, cells) for line, cells in self.rows() if line > above)
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
                fields = count_of(len(cells), "field")
                raise DataError(
                    f"{name_of(self.path)} line {line} has {fields} and the header has {width}{more}: "
                    f'put texts with {self.delimiter!r} in double quotes, or set data.bad_lines = "skip"'
                )

    def row_of_names(self, form: FileFormat) -> tuple[int, Sequence[str], list[Sequence[str]]]:
        """The line of the names, the names, and the first rows below. Raises DataError if there is none."""
        rows: list[tuple[int, tuple[str, ...]]] = []
        try:
            rows += islice(self.rows(), max(HEADS * 2, form.header_row or 0))
        except DataError:  # reading the rows says so; here the first ones are enough
            rows = list(islice(self.rows(), 1))
        if not rows:
            raise DataError(f"{name_of(self.path)} is empty: give a table with rows")
        place: int | None = 0
        if form.header_row is not None:
            place = next((i for i, (line, _) in enumerate(rows) if line == form.header_row), None)
            if place is None:
                raise DataError(f"{name_of(self.path)}: no row begins in line {form.header_row}: set data.header_row")
        elif (form.header is None and any(map(is_empty, rows[0][1]))) or len(rows[0][1]) == 1:
            place = find_names([cells for _, cells in rows], form.columns)
        place = place or 0
        return *rows[place], [cells for _, cells in rows[place + 1 :]]


def open_separated(path: Path, usual: str, form: FileFormat) -> Table:
    """The table in a CSV or TSV file. Raises DataError.

    Args:
        usual: the separator that the file's suffix stands for.
    """
    encoding, note = text_file.find_encoding(path, form.encoding)
    notes = [note] if note else []
    sample = _sample(path, encoding)
    declared = re.fullmatch(r"sep=(.)", sample[0].strip("\r\n") if sample else "", re.IGNORECASE)
    sample = sample[1:] if declared else sample
    delimiter = form.delimiter or (declared[1] if declared else _delimiter(sample, usual))
    delimiter = "\t" if delimiter == "\\t" else delimiter  # as a shell passes it
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(f'data.delimiter {quote(delimiter, 20)}: expected one character, such as ";" or "\\t"')
    if delimiter != usual and form.delimiter is None:
        notes.append(f"{name_of(path)}: columns are separated by {delimiter!r}")
    text = _Separated(path, encoding, delimiter, 1 if declared else 0)
    line, first, below = text.row_of_names(form)
    if form.header is False:
        heading = Heading(0, (), tuple(f"column {i}" for i in range(1, len(first) + 1)), range(len(first)), below)
    else:
        heading = Heading.of(line, first, below)
    if form.header is None and form.header_row is None and _is_data(first, _parse_sample(sample, delimiter)[1:]):
        raise NoHeader(
            f"the first line of {name_of(path)} looks like data ({quote_all(first, 40)}), not like column names: set "
            "data.header = false and name 'column 1', 'column 2'; or data.header = true if they are names"
        )
    check_columns(name_of(path), heading.names, "the first line must name the columns")
    titles = heading.row > text.skipped + 1
    if titles and form.header_row is None:
        notes.append(f"{name_of(path)}: line {line} names the columns; data.header_row names another")
    found = FileFormat(
        None if encoding == text_file.UTF8 else encoding,
        None if delimiter == usual else delimiter,
        None if heading.row else False,
        header_row=line if titles else None,
    )

    def rows(left_out: Counter[str]) -> Iterator[TableRow]:
        return text.whole_rows(heading.row, len(first), left_out, skip=form.skip_bad_lines)

    return replace(heading.table(name_of(path), len(first), rows, notes), found=found)


def _reason(error: csv.Error) -> str:
    text = str(error)
    if "field limit" in text:
        return f"a field is longer than {FIELD_LIMIT} characters, or its closing quote is missing: shorten or close it"
    if "unexpected end" in text:
        return "a double quote is opened and never closed: close it, and write a quote inside a field twice"
    return f'a double quote is out of place ({text}): write a quote inside a quoted field twice, as in "a ""b"""'


def _sample(path: Path, encoding: str) -> list[str]:
    """The first lines of a file that are not blank, of bounded size."""
    sample: list[str] = []
    size = 0
    for line in islice(text_file.read_lines(path, encoding, newline=""), _SAMPLED_LINES):
        size += len(line)
        if sample and size > _SAMPLE_LIMIT:
            break
        if line.strip():
            sample.append(line)
    return sample


def _parse_sample(sample: Sequence[str], delimiter: str) -> list[list[str]]:
    """The rows of a sample, without the last one, which may be cut; empty if they cannot be parsed."""
    try:
        rows = [cells for cells in csv.reader(sample, delimiter=delimiter) if cells]
    except csv.Error:
        return []
    return rows[:-1] if len(rows) > 2 else rows


def _delimiter(sample: Sequence[str], usual: str) -> str:
    """The separator that gives all sampled rows the same number of fields, and more than one. The usual one wins."""
    parsed = {mark: _parse_sample(sample, mark) for mark in dict.fromkeys(usual + SEPARATORS)}
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


_COMMON_NAMES = words_in(
    """text, texts, label, labels, class, category, id, title, name, prompt, completion, document, summary, question,
    answer, input, output, instruction, response, source, target, sentence, review, comment, message, rating, score,
    sentiment, topic"""
)


def _is_data(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row looks like one of the others, and not like names of their columns.

    It does if a cell recurs in its own column, which has few different values, if a number stands above numbers, or if
    every cell is a number, blank or as long as a sentence.
    """
    if len(first) < 2 or not rows or any(cell.strip().lower() in _COMMON_NAMES for cell in first):
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


# --- Excel ------------------------------------------------------------------------------------------------------------


_ERRORS = frozenset(("#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"))  # read as missing
_SAMPLED_ROWS = 200  # rows of each sheet, from which the sheet and the row of names are chosen
_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s+ref="([A-Z]{1,3})([0-9]{1,7}):[A-Z]{1,3}([0-9]{1,7})"')
_CHUNK = 1 << 20

Merged = Mapping[int, Sequence[tuple[int, int]]]  # first row -> (place of the column, last row) of merged cells


@dataclass(frozen=True)
class _Sheet:
    """One sheet that could be the table."""

    title: str
    hidden: bool
    merged: Merged
    heading: Heading
    first: int  # row with anything in it

    @property
    def has_titles(self) -> bool:
        """Whether there are rows above the names."""
        return self.heading.row != self.first

    def fit(self, wanted: Sequence[str]) -> tuple[float, ...]:
        """How well it suits: has the columns that are asked for, is visible, has texts and classes, has many rows."""
        keys = {name_key(name) for name in self.heading.names}
        has = sum(name_key(name) in keys for name in wanted)
        facts = [ColumnFacts(name) for name in self.heading.names]
        for row in self.heading.below:
            for place, column in zip(self.heading.places, facts, strict=True):
                column.add(row[place] if place < len(row) else None)
        texts = [column for column in facts if column.is_texts]
        classes = [column for column in facts if column.is_classes and column not in texts]
        return has, not self.hidden, bool(texts) + bool(texts and classes), min(len(self.heading.below), 10) // 5


def open_excel(path: Path, form: FileFormat) -> Table:
    """The table in a sheet: the one that `form` names, else the one whose columns fit. Raises DataError."""
    _check_archive(path)
    with _sheets(path) as opened:
        titles = list(opened)
        if form.sheet is not None and form.sheet not in titles:
            raise DataError(
                f"{name_of(path)} has no sheet {quote(form.sheet, 40)}: it has {quote_all(titles)}; set data.sheet"
            )
        read = opened if form.sheet is None else {form.sheet: opened[form.sheet]}
        found = [sheet for title, each in read.items() if (sheet := _looked_at(path, title, each, form)) is not None]
    if not found:
        where = f"the sheet {quote(form.sheet, 40)} of " if form.sheet else ""
        there = f"; the sheets are {quote_all(titles, 80)}" if len(titles) > 1 else ""
        raise DataError(f"{where}{name_of(path)} has no table: expected a sheet with column names and rows{there}")
    sheet = max(found, key=lambda each: each.fit(form.columns))  # of equal ones the first
    others = [title for title in titles if title != sheet.title]
    name = f"{name_of(path)}, sheet {sheet.title!r}" if others else name_of(path)
    heading = sheet.heading
    check_columns(name, heading.names, "give each its own name")
    notes = []
    if others and form.sheet is None:
        alike = [each.title for each in found if each.heading.names == heading.names and each is not sheet]
        more = f" (the same columns: {quote_all(alike, 60)})" if alike else ""
        notes.append(
            f"{name_of(path)}: the sheet {sheet.title!r} is read, not {quote_all(others, 60)}{more}; "
            "data.sheet names another"
        )
    if sheet.has_titles and form.header_row is None:
        notes.append(f"{name}: row {heading.row} names the columns; data.header_row names another")

    def rows(_left_out: Counter[str]) -> Iterator[TableRow]:
        with _sheets(path) as opened:
            for number, cells in enumerate(_unmerge_cells(_rows(opened[sheet.title]), sheet.merged), 1):
                if number > heading.row and any(cell is not None for cell in cells):
                    yield number, cells

    return replace(
        heading.table(name, len(heading.names), rows, notes),
        unit="row",
        found=FileFormat(sheet=sheet.title if others else None, header_row=heading.row if sheet.has_titles else None),
        hint=f"the other sheets are {quote_all(others, 80)}: data.sheet names one" if others else "",
    )


def _looked_at(path: Path, title: str, sheet: ReadOnlyWorksheet, form: FileFormat) -> _Sheet | None:
    """What the first rows of a sheet show; None if it has none."""
    merged = _merged_cells(path, sheet)
    sample = list(islice(_unmerge_cells(_rows(sheet), merged), max(_SAMPLED_ROWS, (form.header_row or 0) + HEADS)))
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
    heading = Heading.of(place + 1, sample[place], below)
    return _Sheet(title, sheet.sheet_state != "visible", merged, heading, filled[0])


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


def _unmerge_cells(rows: Iterator[tuple[CellValue, ...]], merged: Merged) -> Iterator[tuple[CellValue, ...]]:
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
