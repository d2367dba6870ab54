"""Reads a source of data into examples. The entry is `read`.

A table is read twice, a row at a time. The first pass checks every cell and counts usable rows and labels. Then the
splits are chosen by row number, and the second pass keeps the chosen rows. So `train = 2000` of a table of a hundred
gigabytes keeps 2000 examples. If the examples do not fit in memory, `ExampleStore` keeps them in a temporary file.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from turret.data import cells
from turret.data.columns import Columns, Schema, find_columns, find_input
from turret.data.example_store import MEMORY, ExampleStore
from turret.data.examples import Dataset, Example, Labelled
from turret.data.files import Table, lines_of
from turret.data.rows import numbered
from turret.data.settings import DataSettings
from turret.data.source import open_source
from turret.data.splits import ROLES, Chosen, Sources, SplitRole, choose, find_sources, shuffled, taken, test_split
from turret.errors import DataError, listed, shown


def read(data: DataSettings, schemas: Sequence[Schema], seed: int = 42, *, memory: int = MEMORY) -> Dataset:
    """Read the source, find the columns and choose the splits. The data set's `notes` report every guess.

    Args:
        data: a recipe's `[data]`.
        schemas: of the recipe's task; of all tasks if the columns have to decide which it is.
        seed: of the order of the rows.
        memory: characters of examples that are kept in memory; more go to a temporary file.

    Raises:
        DataError: the source, a column, a cell or a split cannot be used.
    """
    tables = open_source(data.source)
    sources = find_sources(data, list(tables))
    used = {split: tables[split] for split in dict.fromkeys(sources.split.values())}
    columns = find_columns(data, tables[sources.split["train"]].columns, schemas)
    schema = columns.schema
    _check_columns(used, columns)
    scans = {split: _scan(table, columns) for split, table in used.items()}
    notes = [note for table in used.values() for note in table.notes] + ([columns.note] if columns.note else [])
    notes += [note for split, scan in scans.items() for note in scan.notes(used[split].name)]
    labels: tuple[str, ...] = ()
    if schema.classes:
        labels = _labels(scans, used, sources, columns)
    chosen = choose(data, sources, {split: scan.usable for split, scan in scans.items()}, seed)
    examples = _read_chosen(used, sources, chosen, columns, scans, memory)
    if schema.classes:
        notes += _class_notes(labels, examples["train"], schema.many)
    duplicates, duplicate_notes = _duplicates(examples, schema)
    return Dataset(
        train=examples["train"],
        validation=examples["validation"],
        test=examples["test"],
        kind=schema.kind,
        labels=labels,
        columns=columns.roles,
        notes=(*notes, *chosen.notes, *duplicate_notes),
        duplicates=duplicates,
        digest=_digest(examples),
    )


@dataclass(frozen=True)
class EvaluationRows:
    """Examples to evaluate on, with the line (of a text file) or the number of each one's row."""

    examples: list[Example]
    places: list[int]
    notes: tuple[str, ...]


def read_test(
    data: DataSettings, schema: Schema, seed: int = 42, *, labels: Sequence[str] = ()
) -> tuple[list[Example], tuple[str, ...]]:
    """Examples to evaluate a finished adapter on, and notes. See `read_test_rows`."""
    rows = read_test_rows(data, schema, seed, labels=labels)
    return rows.examples, rows.notes


def read_test_rows(data: DataSettings, schema: Schema, seed: int = 42, *, labels: Sequence[str] = ()) -> EvaluationRows:
    """Examples to evaluate a finished adapter on. Raises DataError.

    `data.test` names the split or the number of rows. Without it they are the test split, else the only split, else the
    validation split.

    Args:
        labels: the classes that the adapter knows.
    """
    tables = open_source(data.source)
    split = test_split(data, list(tables))
    table, last_place = numbered(tables[split])
    columns = find_columns(data, table.columns, [schema])
    scan, examples, places = _Scan(), list[Example](), list[int]()
    for example in _examples(table, columns, scan):
        examples.append(_stripped(example))
        places.append(last_place())
    scan.check(table)
    unknown = sorted({label.strip() for label in scan.labels} - set(labels)) if labels else []
    if unknown:
        raise DataError(
            f"{table.name} has the label {shown(unknown[0])}, which the adapter does not know: "
            f"it knows {listed(labels)}"
        )
    notes = [*table.notes, *([columns.note] if columns.note else []), *scan.notes(table.name)]
    if data.test is not None and not isinstance(data.test, str):
        rows = shuffled(len(examples), seed)[: taken("test", data.test, len(examples), len(examples), notes)]
        examples, places = [examples[row] for row in rows], [places[row] for row in rows]
    return EvaluationRows(examples, places, tuple(notes))


def read_inputs(data: DataSettings, schema: Schema) -> list[str]:
    """The input of each row of a table ("" if missing), or the lines of a `.txt` file. Raises DataError."""
    path = Path(os.path.expanduser(data.source))
    if path.suffix.lower() == ".txt" and os.path.isfile(path):  # Path.is_file raises for a name that is too long
        return lines_of(path)
    tables = open_source(data.source)
    table = tables[test_split(data, list(tables))]
    replaced = cells.Replacements()
    texts = []
    for place, (cell,) in table.read([find_input(data, table.columns, schema)]):
        try:
            texts.append(cells.text_of(cell, replaced) or "")
        except DataError as error:
            raise DataError(f"{table.name} {table.unit} {place}: {error}") from None
    return texts


def _check_columns(used: Mapping[str, Table], columns: Columns) -> None:
    for table in used.values():
        for name in columns.pair:
            if name not in table.columns:
                raise DataError(f"{table.name} has no column {shown(name)}: its columns are {listed(table.columns)}")


# --- the first pass --------------------------------------------------------------------------------------------------


@dataclass
class _Scan:
    """The counts of one pass over a table."""

    rows: int = 0
    usable: int = 0
    without: Counter[str] = field(default_factory=Counter)  # column -> rows without a value in it
    labels: Counter[str] = field(default_factory=Counter)
    replaced: cells.Replacements = field(default_factory=cells.Replacements)

    def notes(self, table: str) -> list[str]:
        lost = [f"{n} of {self.rows} rows without {column!r} are left out" for column, n in self.without.items()]
        return [f"{table}: {note}" for note in [*lost, *self.replaced.notes()]]

    def check(self, table: Table) -> None:
        """Raise DataError if the table has no usable row."""
        if not self.rows:
            raise DataError(f"{table.name} has columns and no rows: give a table with rows")
        if not self.usable:
            lost = " and ".join(f"{n} without {shown(column, 40)}" for column, n in self.without.items())
            raise DataError(f"{table.name} has no usable row: of {self.rows} rows {lost}")


def _scan(table: Table, columns: Columns) -> _Scan:
    scan = _Scan()
    for _ in _examples(table, columns, scan):
        if len(scan.labels) > cells.MOST_CLASSES:
            cells.check_classes(scan.labels, scan.rows, columns.pair[1], columns.schema.many)
    scan.check(table)
    return scan


def _examples(table: Table, columns: Columns, scan: _Scan) -> Iterator[Example]:
    """The usable rows as examples. Rows with a missing cell are counted in `scan`. Raises DataError with the place."""
    schema, (first, second) = columns.schema, columns.pair
    names = table.classes.get(second, ())
    for place, (a, b) in table.read((first, second)):
        scan.rows += 1
        column = first
        try:
            source = cells.text_of(a, scan.replaced)
            column = second
            output = schema.output(b, names, scan.replaced)
        except DataError as error:
            raise DataError(f"{table.name} {table.unit} {place}, column {shown(column, 40)}: {error}") from None
        if source is None or output is None:
            scan.without[first if source is None else second] += 1
        else:
            scan.usable += 1
            if schema.classes:
                scan.labels.update(output if isinstance(output, tuple) else (output,))
            yield schema.example(source, output)


def _labels(
    scans: Mapping[str, _Scan], used: Mapping[str, Table], sources: Sources, columns: Columns
) -> tuple[str, ...]:
    """The classes of the training table, in order. Raises DataError if another split has more."""
    train = sources.split["train"]
    cells.check_alike({label for scan in scans.values() for label in scan.labels})
    cells.check_classes(scans[train].labels, scans[train].rows, columns.pair[1], columns.schema.many)
    for split, scan in scans.items():
        unknown = [label for label in scan.labels if label not in scans[train].labels]
        if unknown:
            raise DataError(
                f"{used[split].name} has the label {shown(unknown[0])} ({scan.labels[unknown[0]]} rows), which the "
                f"training table lacks: its labels are {listed(cells.in_order(scans[train].labels))}"
            )
    return cells.in_order(label.strip() for label in scans[train].labels)


# --- the second pass -------------------------------------------------------------------------------------------------


def _read_chosen(
    used: Mapping[str, Table],
    sources: Sources,
    chosen: Chosen,
    columns: Columns,
    scans: Mapping[str, _Scan],
    memory: int,
) -> dict[SplitRole, ExampleStore]:
    """Read the chosen rows into their splits."""
    stores = {role: ExampleStore(len(chosen.rows[role]), memory) for role in ROLES}
    for split, table in used.items():
        owner = np.zeros(scans[split].usable, dtype=np.int8)  # by usable row: 1 + index of its role; 0: not chosen
        place = np.zeros(scans[split].usable, dtype=np.int64)
        for number, role in enumerate(ROLES, 1):
            if sources.split.get(role) == split:
                owner[chosen.rows[role]] = number
                place[chosen.rows[role]] = np.arange(len(chosen.rows[role]))
        seen = 0
        for example in _examples(table, columns, _Scan()):
            if seen < len(owner) and owner[seen]:
                stores[ROLES[owner[seen] - 1]].put(int(place[seen]), _stripped(example))
            seen += 1
        if seen != len(owner):
            raise DataError(f"{table.name} changed while it was read: start again when nothing writes to it")
    return {role: store.done() for role, store in stores.items()}


def _stripped(example: Example) -> Example:
    if isinstance(example, Labelled) and isinstance(example.label, str):
        return Labelled(example.text, example.label.strip())
    return example


def _class_notes(labels: Sequence[str], train: Sequence[Example], many: bool) -> list[str]:
    """Notes on classes with no or one training example. Raises DataError if there is only one class."""
    counts: Counter[str] = Counter()
    for example in train:
        if isinstance(example, Labelled):
            counts.update(example.labels)
    if not many and len(counts) == 1:
        raise DataError(
            f"all {len(train)} training examples have the label {shown(next(iter(counts)))}: raise data.train"
        )
    notes = []
    if many and any("," in label for label in labels):
        notes.append("labels have commas in them: with multi_label a cell's labels are separated by |")
    for number, word in ((0, "no training example"), (1, "only one training example")):
        found = [label for label in labels if counts[label] == number]
        if found:
            notes.append(f"{word} for the class {listed(found)}")
    return notes


def _duplicates(examples: Mapping[SplitRole, Sequence[Example]], schema: Schema) -> tuple[int, list[str]]:
    """The number of test inputs that are also training inputs, and notes. Blanks around texts are ignored."""
    hashes = {role: _hashes(examples[role]) for role in ROLES}
    train, notes, duplicates = hashes["train"], [], 0
    for role in ("validation", "test"):
        duplicates = int(np.isin(hashes[role], train).sum())  # at the end those of the test split
        if duplicates:
            notes.append(f"{duplicates} of {len(hashes[role])} {role} inputs occur in the training examples too")
    if schema.classes and not schema.many:
        once, with_label = np.unique(train), np.unique(_hashes(examples["train"], outputs=True))
        if len(with_label) > len(once):
            notes.append(f"{len(with_label) - len(once)} training texts occur with more than one label")
    return duplicates, notes


def _hashes(examples: Sequence[Example], outputs: bool = False) -> npt.NDArray[np.uint64]:
    """A hash of 8 bytes for each input, or for each input with its output."""
    numbers = (_hash(e.input.strip() + (f"\0{e.output}" if outputs else "")) for e in examples)
    return np.fromiter(numbers, dtype=np.uint64, count=len(examples))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _digest(examples: Mapping[SplitRole, Sequence[Example]]) -> str:
    """SHA-256 over all fields, each after its length, so that different data sets never give the same bytes."""
    digest = hashlib.sha256()
    for role in ROLES:
        digest.update(f"{role} {len(examples[role])}\n".encode())
        for example in examples[role]:
            output = example.output
            for value in (example.input, *(output if isinstance(output, tuple) else (output,))):
                raw = str(value).encode()
                digest.update(f"{len(raw)}:".encode() + raw)
            digest.update(b"\n")
    return f"sha256:{digest.hexdigest()}"
