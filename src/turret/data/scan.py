"""The first pass over a table: checks every cell, and counts and remembers what the choice of splits needs."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from turret.data import cells
from turret.data.columns import Columns
from turret.data.examples import Example, Pair, labels_of
from turret.data.layouts import Layout
from turret.data.problems import Problems
from turret.data.settings import DataSettings
from turret.data.splits import Kinship
from turret.data.table import CellValue, Table
from turret.errors import DataError, shown


@dataclass(frozen=True)
class Wanted:
    """The columns that are read, and what is remembered of every usable row."""

    columns: tuple[str, ...]  # those of the roles, and group
    separator: str | None  # between the labels of a cell
    group: bool = False
    duplicates: bool = False
    stratify: bool = False

    @classmethod
    def of(cls, data: DataSettings, columns: Columns, group: str | None) -> Wanted:
        """What a recipe's `[data]` asks for. Raises DataError for settings that do not go together."""
        if data.stratify and not columns.schema.classes:
            raise DataError(f"data.stratify needs classes, and {columns.schema.kind} has none: leave it out")
        if data.stratify and group is not None:
            raise DataError("data.group and data.stratify cannot be met together: leave one of them out")
        names = (*columns.roles.values(), *([] if group is None else [group]))
        return cls(names, data.separator, group is not None, bool(data.drop_duplicates), bool(data.stratify))


@dataclass
class Scan:
    """The counts of one pass over a table, and a number for each usable row where one is wanted."""

    rows: int = 0
    usable: int = 0
    without: Counter[str] = field(default_factory=Counter)  # column -> rows without a value in it
    labels: Counter[str] = field(default_factory=Counter)
    replaced: cells.Replacements = field(default_factory=cells.Replacements)
    wrong: dict[str, str] = field(default_factory=dict)  # column -> the first error in it
    wrong_rows: Counter[str] = field(default_factory=Counter)  # column -> rows with an error in it
    changes: Counter[str] = field(default_factory=Counter)  # what happened -> conversations
    ungrouped: int = 0
    several: int = 0  # usable rows with several references
    _references: array[int] = field(default_factory=lambda: array("I"))
    _groups: array[int] = field(default_factory=lambda: array("Q"))
    _inputs: array[int] = field(default_factory=lambda: array("Q"))
    _pairs: array[int] = field(default_factory=lambda: array("Q"))
    _outputs: array[int] = field(default_factory=lambda: array("L"))  # of each row, a number of `_combinations`
    _combinations: dict[tuple[str, ...], int] = field(default_factory=dict)

    def remember(self, wanted: Wanted, example: Example, group: CellValue) -> None:
        """Count a usable row."""
        self.usable += 1
        others = len(example.others) if isinstance(example, Pair) else 0
        self.several += others > 0
        self._references.append(1 + others)
        if wanted.group:
            self._groups.append(self._group(group))
        if wanted.duplicates:
            self._inputs.append(hash_of(example.input.strip()))
            self._pairs.append(hash_of(f"{example.input.strip()}\0{example.output}"))
        if wanted.stratify:
            self._outputs.append(self._combinations.setdefault(labels_of(example), len(self._combinations)))

    def _group(self, cell: CellValue) -> int:
        text = "" if cell is None else str(cell).strip()
        if not text or text == "nan":
            self.ungrouped += 1
            return hash_of(f"row {self.rows}")
        return hash_of(f"group {text}")

    # --- after the pass ---------------------------------------------------------------------------------------------

    @property
    def references(self) -> npt.NDArray[np.int64]:
        """The number of references of each usable row."""
        return np.array(self._references, dtype=np.int64)

    @property
    def groups(self) -> npt.NDArray[np.uint64]:
        return np.array(self._groups, dtype=np.uint64)

    @cached_property
    def kept(self) -> npt.NDArray[np.int64]:
        """The usable rows, without those that repeat an earlier one if `data.drop_duplicates` asks for that."""
        if not self._pairs:
            return np.arange(self.usable)
        _, first = np.unique(np.array(self._pairs, dtype=np.uint64), return_index=True)
        return np.sort(first)

    @property
    def rows_kept(self) -> int:
        return len(self.kept)

    @property
    def repeated(self) -> int:
        return self.usable - self.rows_kept

    @property
    def inputs_kept(self) -> npt.NDArray[np.uint64]:
        """A hash of the input of each kept row."""
        return np.array(self._inputs, dtype=np.uint64)[self.kept]

    def kinship(self, spelling: Mapping[str, str]) -> Kinship:
        """Classes and groups of the kept rows. A row with several labels counts as one of its rarest label."""
        groups = self.groups[self.kept] if self._groups else None
        if not self._outputs:
            return Kinship(groups=groups)
        counts: Counter[str] = Counter()
        for label, count in self.labels.items():
            counts[spelling[label]] += count
        by_rarity = sorted(counts, key=lambda label: (counts[label], label))
        numbers = {label: number for number, label in enumerate(by_rarity)}
        rarest = [min((numbers[spelling[label]] for label in each), default=-1) for each in self._combinations]
        outputs = np.array(self._outputs, dtype=np.int64)[self.kept]
        return Kinship(np.array(rarest, dtype=np.int64)[outputs], groups)

    def notes(self, table: str) -> list[str]:
        lost = [f"{n} of {self.rows} rows without {column!r} are left out" for column, n in self.without.items()]
        if self.ungrouped:
            lost.append(f"{self.ungrouped} rows without a group are groups of their own")
        if self.several:
            lost.append(f"{self.several} of {self.rows} rows have several references: in training each is an example")
        lost += [f"{what} in {n} of {self.rows} conversations" for what, n in self.changes.items()]
        return [f"{table}: {note}" for note in [*lost, *self.replaced.notes()]]

    def report(self, table: Table, problems: Problems) -> None:
        """Add what is wrong with the table to `problems`."""
        for column, first in self.wrong.items():
            count = self.wrong_rows[column]
            problems.add(f"{first} ({count} such rows)" if count > 1 else first)
        if not self.rows:
            problems.add(f"{table.name} has columns and no rows: give a table with rows")
        elif not self.usable and not self.wrong:
            lost = " and ".join(f"{n} without {shown(column, 40)}" for column, n in self.without.items())
            problems.add(f"{table.name} has no usable row: of {self.rows} rows {lost}")


def scan_of(table: Table, columns: Columns, wanted: Wanted, problems: Problems) -> Scan:
    """Read a table once. Adds what is wrong with it to `problems`."""
    scan = Scan()
    for _ in examples_of(table, columns, wanted, scan, collect=True):
        if len(scan.labels) > cells.MOST_CLASSES:
            cells.check_classes(scan.labels, scan.rows, columns.pair[1], columns.schema.many)
    scan.report(table, problems)
    return scan


def examples_of(
    table: Table, columns: Columns, wanted: Wanted, scan: Scan, *, collect: bool = False
) -> Iterator[Example]:
    """The usable rows as examples. Rows with a missing cell are counted in `scan`.

    Args:
        collect: collect wrong cells in `scan.wrong` and go on; else raise DataError for the first, with its place.
    """
    if columns.layout is not None:
        yield from _conversations_of(table, columns.layout, wanted, scan, collect)
        return
    schema, (first, second) = columns.schema, columns.pair
    names = table.classes.get(second, ())
    for place, (a, b, *group) in table.read(wanted.columns):
        scan.rows += 1
        column = first
        try:
            source = cells.text_of(a, scan.replaced)
            column = second
            cell = cells.split_labels(b, wanted.separator) if schema.many else b
            output = schema.output(cell, names, scan.replaced)
        except DataError as error:
            text = f"{table.name} {table.unit} {place}, column {shown(column, 40)}: {error}"
            if not collect:
                raise DataError(text) from None
            scan.wrong.setdefault(column, text)
            scan.wrong_rows[column] += 1
            continue
        if source is None or output is None:
            scan.without[first if source is None else second] += 1
        else:
            if schema.classes:
                scan.labels.update(output if isinstance(output, tuple) else (output,))
            example = schema.example(source, output)
            scan.remember(wanted, example, group[0] if group else None)
            yield example


def _conversations_of(table: Table, layout: Layout, wanted: Wanted, scan: Scan, collect: bool) -> Iterator[Example]:
    count = len(layout.roles)
    for place, row in table.read(wanted.columns):
        scan.rows += 1
        try:
            found = layout.conversation(row[:count], scan.replaced, scan.changes)
        except DataError as error:
            text = f"{table.name} {table.unit} {place}, {error}"
            if not collect:
                raise DataError(text) from None
            column = next(iter(layout.roles.values()))
            scan.wrong.setdefault(column, text)
            scan.wrong_rows[column] += 1
            continue
        if isinstance(found, str):
            scan.without[found] += 1
        else:
            scan.remember(wanted, found, row[count] if len(row) > count else None)
            yield found


def hash_of(text: str) -> int:
    """A hash of 8 bytes, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
