"""The type of a table: named columns, and rows that are read one at a time.

Every question about a table's columns is asked here: which one a name means, and which names there are.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time
from typing import Literal, Protocol, TypeAlias

from turret.errors import DataError, one_line, quote, quote_all

FIELD_LIMIT = 10_000_000  # characters; ten long novels
LINE_LIMIT = 32_000_000
JSON_LIMIT = 1_000_000_000  # bytes
MOST_COLUMNS = 16_384  # as of an Excel sheet
ROLES = (  # keys of a recipe's [data] that name a column
    *("text", "text_pair", "label", "document", "summary", "prompt", "completion", "chosen", "rejected"),
    *("tokens", "tags", "spans", "anchor", "positive", "negative"),
    *("messages", "input", "system", "tools"),
)
NUMBER = re.compile(r"[+-]?[0-9]+([.,\u00a0 ][0-9]+)*\s?[%€$£]?")
DATE = re.compile(r"[0-9]{1,4}[-./][0-9]{1,2}[-./][0-9]{1,4}([ T].*)?|[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?")
_LISTED = 12  # columns that an error names
UNNAMED = "unnamed "  # before the place of a column without a name
_INVISIBLE = "\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"  # marks of direction and others
_OUTER = re.compile(rf"^[\s{_INVISIBLE}]+|[\s{_INVISIBLE}]+$")

_KEPT = 200  # characters of a cell, which is enough to tell different ones
_FRACTION = re.compile(r"[+-]?[0-9]*[.,](?!0+$)[0-9]+")
IDEOGRAPHS = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # scripts without blanks between words
BETWEEN = ": "  # a column and its class, among the answers of several columns

CellValue: TypeAlias = object  # JSON, Excel and Parquet hold values of any type; `cells` checks them
Size = int | float | str | None  # a number of rows, a fraction, or the name of a split
TableRow = tuple[int, tuple[CellValue, ...]]  # line or row number, and the cells of the requested columns


@dataclass(frozen=True)
class FileFormat:
    """How the bytes of a file are read as a table, as far as a recipe says it; None: Turret finds out."""

    encoding: str | None = None  # of a text file
    delimiter: str | None = None  # between the columns of a CSV file
    header: bool | None = None  # whether the first line of a CSV file names the columns
    sheet: str | None = None  # of an Excel file
    header_row: int | None = None  # the row of an Excel file, or the line of a CSV file, that names the columns
    skip_bad_lines: bool = False  # leave out lines that cannot be read, and count them
    columns: tuple[str, ...] = ()  # that the table has; they show which sheet and which row of names is meant


DETECTED = FileFormat()  # everything is found out


class Answers(dict[str, CellValue]):
    """The cells of a row in several columns, by column: its answers to several questions."""


class DataSettings(Protocol):
    """`turret.recipe.Data`, without the columns of `ROLES`, which are asked for by name.

    `turret.recipe` imports this package, so it cannot be imported here.
    """

    source: str
    encoding: str | None
    delimiter: str | None
    header: bool | None
    sheet: str | None
    header_row: int | None
    bad_lines: Literal["skip"] | None
    rename: dict[str, str] | None
    label: str | list[str] | None
    ignore: list[str] | None
    separator: str | None
    normalize_labels: bool | None
    drop_duplicates: bool | None
    group: str | None
    stratify: bool | None
    train: Size
    validation: Size
    test: Size


def format_of(data: DataSettings, trained: Mapping[str, str] | None = None) -> FileFormat:
    """How the source's files are read, as far as the recipe says it.

    Args:
        trained: role -> column of the table that a version was trained on, if the recipe names none.
    """
    named = {role: name for role in ROLES if (name := getattr(data, role)) is not None}
    every = named.values() if named or not trained else trained.values()
    columns = tuple(each for name in every for each in ([name] if isinstance(name, str) else name))
    return FileFormat(
        data.encoding, data.delimiter, data.header, data.sheet, data.header_row, data.bad_lines == "skip", columns
    )


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Args:
        name: for messages.
        read: (columns) -> the rows, from the start. It can be called many times.
        classes: names of class numbers, by column.
        notes: for the user.
        unit: what the number of a row counts, for messages.
        found: how the file is read, as far as it had to be found out.
        hint: what else the file has, for errors about columns.
        left_out: what the last reading left out -> how often.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[TableRow]]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unit: str = "line"
    found: FileFormat = DETECTED
    hint: str = ""
    left_out: Counter[str] = field(default_factory=Counter)

    def left_out_notes(self) -> list[str]:
        """A note for each kind of rows that the last reading left out."""
        return [f"{self.name}: {what} are left out: {count}" for what, count in self.left_out.items() if count]

    def with_note(self, note: str | None) -> Table:
        """The same table with one more note, if there is one."""
        return replace(self, notes=(*self.notes, note)) if note else self


def from_rows(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, CellValue]]) -> Table:
    """A table of rows in memory."""

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        for number, row in enumerate(rows, 1):
            yield number, tuple(row.get(column) for column in columns)

    return Table(name, tuple(columns), read, unit="row")


def check_columns(name: str, columns: Sequence[str], remedy: str) -> None:
    """Raise DataError if two columns of a table have the same name, or if there are more than `MOST_COLUMNS`.

    Args:
        name: of the table.
    """
    if len(columns) > MOST_COLUMNS:
        raise DataError(f"{name} has {len(columns)} columns, expected at most {MOST_COLUMNS}: leave out unused ones")
    if twice := sorted(column for column, count in Counter(columns).items() if count > 1):
        raise DataError(f"{name} has the column {quote(twice[0])} more than once: {remedy}")


def find_column(name: str, columns: Sequence[str]) -> str | None:
    """The column of that name, or the only one that differs in case or blanks only."""
    if name in columns:
        return name
    alike = [column for column in columns if name_key(column) == name_key(name)]
    return alike[0] if len(alike) == 1 else None


def require_columns(given: Mapping[str, str], columns: Sequence[str]) -> dict[str, str]:
    """The columns by role, as the table spells them. Raises DataError, which names every one that is not there."""
    found = {role: column for role, name in given.items() if (column := find_column(name, columns)) is not None}
    missing = list(dict.fromkeys(name for role, name in given.items() if role not in found))
    if not missing:
        return found
    near = [difflib.get_close_matches(name_key(name), [name_key(each) for each in columns], n=1) for name in missing]
    meant = [quote(next(c for c in columns if name_key(c) == match[0]), 40) for match in near if match]
    no = f"is no column {quote(missing[0])}" if len(missing) == 1 else f"are no columns {quote_all(missing, 60)}"
    ask = f", did you mean {' and '.join(meant)}?" if meant else ""
    raise DataError(f"there {no}: the columns are {list_columns(columns, 150 if meant else 180)}{ask}")


def list_columns(columns: Sequence[str], room: int = 140) -> str:
    """Up to twelve names of columns, the long ones shortened so that they fit, and the number of the others.

    Args:
        room: characters.
    """
    names = list(columns[:_LISTED])
    lengths, left = sorted(len(quote(name, room)) - 2 for name in names), room - 4 * len(names)
    most = 8
    for place, length in enumerate(lengths):  # what short names leave is for the long ones
        most = max(8, left // (len(lengths) - place))
        left -= min(length, most)
    more = f" and {len(columns) - len(names)} more" if len(columns) > len(names) else ""
    return ", ".join(quote(name, most + 2) for name in names) + more or "none"


def reason_of(error: Exception, most: int = 120) -> str:
    """The first line of an error's text."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return one_line(lines[0], most) if lines else type(error).__name__


# --- what a cell or a name is ----------------------------------------------------------------------------------------


def trim_text(text: str) -> str:
    """The text without blanks at its ends, and there without marks that nobody sees, such as those of direction."""
    text = text.strip()
    return text if text.isascii() else _OUTER.sub("", text)


def name_key(name: str) -> str:
    """Equal for names that differ in case or blanks only."""
    return " ".join(trim_text(name).split()).casefold()


def is_empty(cell: CellValue) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def is_missing(cell: CellValue) -> bool:
    """Whether a cell has no value: None, NaN, or blanks only."""
    return is_empty(cell) or (isinstance(cell, float) and cell != cell)


def words_in(text: str) -> tuple[str, ...]:
    """Words and phrases between commas."""
    return tuple(word for each in text.split(",") if (word := " ".join(each.split())))


def is_value(cell: CellValue) -> bool:
    """Whether a cell is a number, a date or a time, also if it is written as a text."""
    if isinstance(cell, str):
        text = cell.strip()
        return bool(NUMBER.fullmatch(text) or DATE.fullmatch(text))
    return isinstance(cell, (int, float, date, time))


def is_unnamed(column: str) -> bool:
    """Whether a column has no name in the file."""
    return column.startswith(UNNAMED) and column.removeprefix(UNNAMED).isdigit()


# --- what the cells of a column are like ------------------------------------------------------------------------------


def answer_to(column: str, label: str) -> str:
    """The class of one of several columns."""
    return f"{column}{BETWEEN}{label}"


@dataclass
class ColumnFacts:
    """What the cells of one column are like."""

    name: str
    filled: int = 0
    length: int = 0  # characters of all texts
    words: int = 0
    numbers: int = 0
    dates: int = 0
    lists: int = 0
    several: int = 0  # lists of two or more
    values: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)

    def add(self, cell: CellValue) -> None:
        if isinstance(cell, Answers):
            cell = [answer_to(name, trim_text(str(each))) for name, each in cell.items() if not is_empty(each)]
        if isinstance(cell, (list, tuple)):
            self.filled += bool(cell)
            self.lists += 1
            self.several += len(cell) > 1
            self.values.update(str(each) for each in cell)
            turns = [each for each in cell if isinstance(each, dict)]
            self.lengths += [len(str(turns))] if turns else [len(str(each)) for each in cell]
            return
        text = "" if is_missing(cell) else trim_text(str(cell))
        if not text:
            return
        self.filled += 1
        self.length += len(text)
        self.lengths.append(len(text))
        self.words += len(text.split()) + len(IDEOGRAPHS.findall(text)) // 2
        self.numbers += bool(NUMBER.fullmatch(text))
        self.dates += bool(DATE.fullmatch(text))
        self.values[text[:_KEPT]] += 1

    @property
    def mean(self) -> float:
        """Characters of a filled cell."""
        return self.length / max(1, self.filled)

    @property
    def is_texts(self) -> bool:
        """Whether most cells are sentences, nearly all different."""
        words = self.words / max(1, self.filled)
        return not self.lists and self.filled > 0 and words >= 2 and 2 * len(self.values) >= self.filled

    @property
    def is_classes(self) -> bool:
        """Whether a few short values recur."""
        if self.filled < 4 or self.dates * 2 > self.filled:
            return False
        most = max(3, min(100, self.filled // 4))
        fractions = sum(n for value, n in self.values.items() if _FRACTION.fullmatch(value))
        return 2 <= len(self.values) <= most and self.mean <= 60 and fractions * 10 < self.filled

    @property
    def usual_length(self) -> int:
        """Characters that nine of ten texts do not exceed."""
        return sorted(self.lengths)[int(0.9 * (len(self.lengths) - 1))] if self.lengths else 0
