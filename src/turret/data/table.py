"""The type of a table: named columns, and rows that are read one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from turret.errors import DataError, one_line, shown

FIELD_LIMIT = 10_000_000  # characters; ten long novels
LINE_LIMIT = 32_000_000
JSON_LIMIT = 1_000_000_000  # bytes
MOST_COLUMNS = 16_384  # as of an Excel sheet
SAMPLED_ROWS = 100  # rows of JSON whose keys are the columns

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


DETECTED = FileFormat()  # everything is found out


class DataSettings(Protocol):
    """The fields of `turret.recipe.Data`. `turret.recipe` imports this package, so it cannot be imported here."""

    source: str
    encoding: str | None
    delimiter: str | None
    header: bool | None
    sheet: str | None
    text: str | None
    label: str | None
    document: str | None
    summary: str | None
    prompt: str | None
    completion: str | None
    messages: str | None
    input: str | None
    system: str | None
    tools: str | None
    ignore: list[str] | None
    separator: str | None
    normalize_labels: bool | None
    drop_duplicates: bool | None
    group: str | None
    stratify: bool | None
    train: Size
    validation: Size
    test: Size


def format_of(data: DataSettings) -> FileFormat:
    """How the source's files are read, as far as the recipe says it."""
    return FileFormat(data.encoding, data.delimiter, data.header, data.sheet)


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
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[TableRow]]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unit: str = "line"
    found: FileFormat = DETECTED

    def with_note(self, note: str) -> Table:
        """The same table with one more note."""
        return replace(self, notes=(*self.notes, note))


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
        raise DataError(f"{name} has the column {shown(twice[0])} more than once: {remedy}")


def reason_of(error: Exception, most: int = 120) -> str:
    """The first line of an error's text."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return one_line(lines[0], most) if lines else type(error).__name__
