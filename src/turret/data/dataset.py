"""Reads a source of data into examples. The entry is `read`.

A table is read twice, a row at a time. The first pass checks every cell and counts usable rows and labels. Then the
splits are chosen by row number, and the second pass keeps the chosen rows. So `train = 2000` of a table of a hundred
gigabytes keeps 2000 examples. If the examples do not fit in memory, `ExampleStore` keeps them in a temporary file.

One error reports the problems of columns, or those of all cells: the first few, and a count of the others.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from turret.data import cells
from turret.data.columns import Columns, Layout, Schema, aligned, check_unused, find_columns, find_group, fitting
from turret.data.examples import MEMORY, Dataset, Example, ExampleStore
from turret.data.profile import columns_of, rivals_note
from turret.data.rows import numbered
from turret.data.source import open_labelled
from turret.data.splits import (
    ROLES,
    Chosen,
    Kinship,
    Sources,
    SplitRole,
    choose,
    find_sources,
    shuffled,
    taken,
    test_split,
)
from turret.data.table import CellValue, DataSettings, Table, format_of
from turret.errors import DataError, counted, listed, one_line, shown

T = TypeVar("T")
_ROOM = 270  # characters of the error
_MOST = 4  # problems that are named; the others are counted
FEWEST = 10  # training examples; fewer may be equal by chance
CONSTANT = 0.9  # share of the training examples with the same input from which on it counts as constant


def read(data: DataSettings, schemas: Sequence[Schema], seed: int = 42, *, memory: int = MEMORY) -> Dataset:
    """Read the source, find the columns and choose the splits. The data set's `notes` report every guess.

    Args:
        data: a recipe's `[data]`.
        schemas: of the recipe's task; of all tasks if the columns have to decide which it is.
        seed: of the order of the rows.
        memory: characters of examples that are kept in memory; more go to a temporary file.

    Raises:
        DataError: the source, a column, a cell or a split cannot be used. It names the first problems that were found.
    """
    tables, schemas = open_labelled(data, format_of(data)), fitting(data, schemas)
    problems = Problems()
    sources = problems.note(lambda: find_sources(data, list(tables)))
    train = tables[sources.split["train"] if sources else next(iter(tables))]
    columns = problems.note(lambda: columns_of(train, data, schemas))
    group = problems.note(lambda: find_group(data, train.columns))
    if columns is None:  # perhaps because the file was read in the wrong way
        for note in [*train.notes, *([train.hint] if train.hint else [])]:
            problems.add(note)
    problems.require()
    assert sources is not None
    assert columns is not None
    check_unused(data, train, columns)
    schema = columns.schema
    wanted = Wanted.of(data, columns, group)
    used = {split: aligned(tables[split], wanted.columns) for split in dict.fromkeys(sources.split.values())}
    scans = {split: scan_of(table, columns, wanted, problems) for split, table in used.items()}
    spelling: Mapping[str, str] = {}
    if schema.classes:
        spelling = _spelling(data, scans)
        problems.note(lambda: _check_labels(data, scans, used, sources, columns, spelling))
    problems.require()
    notes = [note for table in used.values() for note in table.notes] + ([columns.note] if columns.note else [])
    notes += [note for split, scan in scans.items() for note in scan.notes(used[split])]
    notes += [*_spelling_notes(spelling), *_rename_notes(data, scans)]
    notes += rivals_note(train, data, columns)
    labels = (
        cells.in_order({spelling[label] for label in scans[sources.split["train"]].labels}) if schema.classes else ()
    )
    _check_groups(data, scans, used)
    counts = {split: scan.rows_kept for split, scan in scans.items()}
    chosen = choose(data, sources, counts, seed, {split: scan.kinship(spelling) for split, scan in scans.items()})
    chosen, leak_notes = _without_leaks(chosen, sources, scans) if data.drop_duplicates else (chosen, [])
    examples = _read_chosen(used, sources, chosen, columns, wanted, scans, spelling, memory)
    if schema.classes:
        notes += _class_notes(labels, examples["train"], schema)
    inputs, both = {role: _hashes(examples[role]) for role in ROLES}, _hashes(examples["train"], outputs=True)
    check_varied(inputs["train"], both, columns)
    duplicates, duplicate_notes = _duplicates(inputs, both, schema)
    return Dataset(
        train=examples["train"],
        validation=examples["validation"],
        test=examples["test"],
        kind=schema.kind,
        labels=labels,
        columns=columns.roles,
        notes=(*notes, *chosen.notes, *leak_notes, *duplicate_notes),
        duplicates=duplicates,
        digest=digest_of(examples),
    )


@dataclass(frozen=True)
class EvaluationRows:
    """Examples to evaluate on, with the line (of a text file) or the number of each one's row."""

    examples: list[Example]
    places: list[int]
    notes: tuple[str, ...]


def test_columns(data: DataSettings) -> tuple[str, ...]:
    """The columns of the table that `read_test` reads. Raises DataError."""
    tables = open_labelled(data, format_of(data))
    return tables[test_split(data, list(tables))].columns


def read_test(
    data: DataSettings,
    schema: Schema,
    seed: int = 42,
    *,
    labels: Sequence[str] = (),
    trained: Mapping[str, str] | None = None,
) -> EvaluationRows:
    """Examples to evaluate a finished adapter on. Raises DataError.

    `data.test` names the split or the number of rows. Without it they are the test split, else the only split, else the
    validation split.

    Args:
        labels: the classes that the adapter knows.
        trained: role -> column of the table that the adapter was trained on.
    """
    fitting(data, [schema])
    tables = open_labelled(data, format_of(data, trained))
    problems = Problems()
    split = problems.note(lambda: test_split(data, list(tables)))
    table, last_place = numbered(tables[split] if split is not None else next(iter(tables.values())))
    columns = problems.note(lambda: find_columns(data, table.columns, [schema], trained=trained))
    if columns is None and table.hint:
        problems.add(table.hint)
    problems.require()
    assert columns is not None
    wanted = Wanted.of(data, columns, None)
    scan, rows, places = Scan(), list[Example](), list[int]()
    for example in examples_of(table, columns, wanted, scan, collect=True):
        rows.append(example)
        places.append(last_place())
    scan.report(table, problems)
    spelling = _known_spelling(data, scan.labels, labels) if schema.classes else {}
    unknown = sorted({spelling[label] for label in scan.labels} - set(labels)) if labels else []
    if unknown:
        problems.add(
            f"{table.name} has the label {listed(unknown, 40)}, which the adapter does not know: "
            f"it knows {listed(labels, 60)}" + ("" if data.normalize_labels else _offer(unknown, labels))
        )
    problems.require()
    examples = [example.respelt(spelling) for example in rows]
    notes = [*table.notes, *([columns.note] if columns.note else []), *scan.notes(table)]
    if data.test is not None and not isinstance(data.test, str):
        numbers = shuffled(len(examples), seed)[: taken("test", data.test, len(examples), len(examples), notes)]
        examples, places = [examples[number] for number in numbers], [places[number] for number in numbers]
    return EvaluationRows(examples, places, tuple(notes))


# --- checks between the passes ---------------------------------------------------------------------------------------


def _spelling(data: DataSettings, scans: Mapping[str, Scan]) -> dict[str, str]:
    """Label -> class: the label itself, or its most frequent spelling with `data.normalize_labels`."""
    counts: Counter[str] = Counter()
    for scan in scans.values():
        counts.update(scan.labels)
    return cells.spellings(counts) if data.normalize_labels else {label: label for label in counts}


def _known_spelling(data: DataSettings, found: Mapping[str, int], labels: Sequence[str]) -> dict[str, str]:
    """Label -> class that an adapter knows, compared without case and blanks with `data.normalize_labels`."""
    known = {cells.key_of(label): label for label in labels} if data.normalize_labels else {}
    return {label: label if label in labels else known.get(cells.key_of(label), label) for label in found}


def _offer(unknown: Sequence[str], labels: Sequence[str]) -> str:
    keys = {cells.key_of(label) for label in labels}
    alike = all(cells.key_of(label) in keys for label in unknown)
    return "; set data.normalize_labels = true to ignore case and blanks" if alike else ""


def _spelling_notes(spelling: Mapping[str, str]) -> list[str]:
    changed = {label: name for label, name in spelling.items() if label != name}
    if not changed:
        return []
    first = min(changed)
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return [f"labels that differ in case or blanks only are one class: {first!r} is {changed[first]!r}{more}"]


def _rename_notes(data: DataSettings, scans: Mapping[str, Scan]) -> list[str]:
    """How many rows `data.rename` changed. Raises DataError for a name that no row has."""
    counts: Counter[str] = Counter()
    for scan in scans.values():
        counts.update(scan.renamed)
    notes = []
    for label, meant in (data.rename or {}).items():
        if not counts[label]:
            there = {each for scan in scans.values() for each in scan.labels}
            raise DataError(
                f"data.rename names the label {shown(label, 40)}, which no row has: the labels are "
                f"{listed(cells.in_order(there))}"
            )
        notes.append(
            f"{counted(counts[label], 'row')} with the label {label!r}: "
            + ((meant and f"read as {meant!r}") or "left out")
        )
    return notes


def _check_labels(
    data: DataSettings,
    scans: Mapping[str, Scan],
    used: Mapping[str, Table],
    sources: Sources,
    columns: Columns,
    spelling: Mapping[str, str],
) -> None:
    """Raise DataError if the labels are no classes, or another split has more of them than the training table."""
    train, column, many = sources.split["train"], columns.answer, columns.schema.many
    problems = Problems()
    alike: set[str] = set()  # keys of labels that are complained of already
    if not data.normalize_labels:
        every = {label for scan in scans.values() for label in scan.labels}
        problems.note(lambda: cells.check_alike(every))
        keys = Counter(cells.key_of(label) for label in every)
        alike = {key for key, count in keys.items() if count > 1}
    counts: Counter[str] = Counter()
    for label, count in scans[train].labels.items():
        counts[spelling[label]] += count
    own, rows = {column: counts}, scans[train].rows
    if isinstance(data.label, list):  # each of them is as a column of its own
        own, many = cells.by_column(counts, data.label), False
    for name, classes in own.items():
        if not scans[train].wrong:  # rows that are wrong would be missing in the counts
            cells.check_classes(classes, rows, name, many)
        if data.separator is None:
            problems.note(partial(cells.check_joined, classes, name, many))
    for split, scan in scans.items():
        unknown = [x for x in scan.labels if spelling[x] not in counts and cells.key_of(x) not in alike]
        if unknown:
            rest = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            problems.add(
                f"{used[split].name} has the label {shown(unknown[0])} ({scan.labels[unknown[0]]} rows){rest}, which "
                f"the training table lacks: its labels are {listed(cells.in_order(counts))}"
            )
    problems.require()


def _check_groups(data: DataSettings, scans: Mapping[str, Scan], used: Mapping[str, Table]) -> None:
    """Raise DataError if two splits of the source share a group."""
    if data.group is None:
        return
    names = list(scans)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            shared = np.intersect1d(scans[first].groups, scans[second].groups)
            if len(shared):
                raise DataError(
                    f"{used[first].name} and {used[second].name} share {len(shared)} groups of {shown(data.group, 40)}"
                    ": give one table, which data.group splits, or leave data.group out"
                )


def _without_leaks(chosen: Chosen, sources: Sources, scans: Mapping[str, Scan]) -> tuple[Chosen, list[str]]:
    """The chosen rows without training rows whose input is also a validation or test input, and notes on all drops."""
    held = [
        scans[sources.split[role]].inputs_kept[chosen.rows[role]]
        for role in ("test", "validation")
        if role in sources.split
    ]
    train = chosen.rows["train"]
    leaks = (
        np.isin(scans[sources.split["train"]].inputs_kept[train], np.concatenate(held)) if held else np.zeros(0, bool)
    )
    repeated = [scan.repeated for scan in scans.values() if scan.repeated]
    notes = [
        f"{counted(n, 'row')} that {'repeats' if n == 1 else 'repeat'} another one {_is(n)} left out" for n in repeated
    ]
    if leaks.any():
        train = train[~leaks]
        count = int(leaks.sum())
        whose = "its input is" if count == 1 else "their inputs are"
        notes.append(f"{counted(count, 'training row', 'left out')}, because {whose} held out too")
    if not len(train):
        raise DataError(
            "data.drop_duplicates leaves no training row, because all inputs are held out too: leave it out"
        )
    return Chosen({**chosen.rows, "train": train}, chosen.notes), notes


# --- the second pass -------------------------------------------------------------------------------------------------


def _read_chosen(
    used: Mapping[str, Table],
    sources: Sources,
    chosen: Chosen,
    columns: Columns,
    wanted: Wanted,
    scans: Mapping[str, Scan],
    spelling: Mapping[str, str],
    memory: int,
) -> dict[SplitRole, ExampleStore]:
    """Read the chosen rows into their splits. A training row with several references is an example for each of them."""
    spread = {role: _spread(scans, sources, chosen, role) for role in ROLES}
    wanted = replace(wanted, group=False, duplicates=False, stratify=False)  # the first pass remembered it
    stores = {role: ExampleStore(int(spread[role].sum()), memory) for role in ROLES}
    for split, table in used.items():
        scan = scans[split]
        owner = np.zeros(scan.usable, dtype=np.int8)  # by usable row: 1 + index of its role; 0: not chosen
        place = np.zeros(scan.usable, dtype=np.int64)
        for number, role in enumerate(ROLES, 1):
            if sources.split.get(role) == split:
                rows = scan.kept[chosen.rows[role]]
                owner[rows] = number
                place[rows] = np.cumsum(spread[role]) - spread[role]
        seen = 0
        for example in examples_of(table, columns, wanted, Scan()):
            if seen < len(owner) and owner[seen]:
                role = ROLES[owner[seen] - 1]
                own = example.respelt(spelling)
                for step, each in enumerate(own.in_training() if role == "train" else (own,)):
                    stores[role].put(int(place[seen]) + step, each)
            seen += 1
        if seen != len(owner):
            raise DataError(f"{table.name} changed while it was read: start again when nothing writes to it")
    return {role: store.done() for role, store in stores.items()}


def _spread(scans: Mapping[str, Scan], sources: Sources, chosen: Chosen, role: SplitRole) -> npt.NDArray[np.int64]:
    """The number of examples of each chosen row of a role."""
    rows = chosen.rows[role]
    if role != "train" or role not in sources.split:
        return np.ones(len(rows), dtype=np.int64)
    scan = scans[sources.split[role]]
    return scan.references[scan.kept[rows]]


def _class_notes(labels: Sequence[str], train: Sequence[Example], schema: Schema) -> list[str]:
    """Notes on classes with no or one training example. Raises DataError if there is only one class."""
    counts: Counter[str] = Counter()
    for example in train:
        counts.update(example.labels)
    if not schema.many and len(counts) == 1:
        raise DataError(
            f"all {len(train)} training examples have the label {shown(next(iter(counts)))}: raise data.train"
        )
    notes = []
    if schema.many and not (schema.spans or schema.several) and any("," in label for label in labels):
        notes.append("labels have commas in them: if a comma separates labels, set data.separator")
    for number, word in ((0, "no training example"), (1, "only one training example")):
        found = [label for label in labels if counts[label] == number]
        if found:
            notes.append(f"{word} for the class {listed(found)}")
    return notes


def _duplicates(
    inputs: Mapping[SplitRole, npt.NDArray[np.uint64]], both: npt.NDArray[np.uint64], schema: Schema
) -> tuple[int, list[str]]:
    """The number of test inputs that are also training inputs, and notes. Blanks around texts are ignored.

    Args:
        inputs: a hash of each input (N,), by role.
        both: a hash of each training input with its output (N,).
    """
    train, notes, duplicates = inputs["train"], [], 0
    for role in ("validation", "test"):
        duplicates = int(np.isin(inputs[role], train).sum())  # at the end those of the test split
        if duplicates:
            occurs = "occurs" if duplicates == 1 else "occur"
            notes.append(
                f"{duplicates} of {counted(len(inputs[role]), f'{role} input')} {occurs} in the training examples too"
            )
    if schema.classes and not schema.many:
        once, with_label = np.unique(train), np.unique(both)
        if len(with_label) > len(once):
            count = len(with_label) - len(once)
            notes.append(
                f"{counted(count, 'training text')} {'occurs' if count == 1 else 'occur'} with more than one label"
            )
    return duplicates, notes


def _hashes(examples: Sequence[Example], outputs: bool = False) -> npt.NDArray[np.uint64]:
    """A hash of 8 bytes for each input, or for each input with its output."""
    numbers = (hash_of(e.input.strip() + (f"\0{e.output}" if outputs else "")) for e in examples)
    return np.fromiter(numbers, dtype=np.uint64, count=len(examples))


def digest_of(examples: Mapping[SplitRole, Sequence[Example]]) -> str:
    """SHA-256 over all fields, each after its length, so that different data sets never give the same bytes."""
    digest = hashlib.sha256()
    for role in ROLES:
        digest.update(f"{role} {len(examples.get(role, ()))}\n".encode())
        for example in examples.get(role, ()):
            for value in example.parts():
                raw = value.encode()
                digest.update(f"{len(raw)}:".encode() + raw)
            digest.update(b"\n")
    return f"sha256:{digest.hexdigest()}"


def check_varied(inputs: npt.NDArray[np.uint64], both: npt.NDArray[np.uint64], found: Columns) -> None:
    """Raise DataError if nearly all training examples ask the same and are answered differently.

    Args:
        inputs: a hash of each training input (N,).
        both: a hash of each training input with its output (N,).
        found: the columns; a table with classes is not judged.
    """
    if found.schema.classes or len(inputs) < FEWEST:
        return
    values, counts = np.unique(inputs, return_counts=True)
    most = int(np.max(counts))
    if most >= CONSTANT * len(inputs) and len(np.unique(both)) > len(values):
        raise DataError(
            f"{most} of {len(inputs)} training examples have the same input (column "
            f"{shown(next(iter(found.roles.values())), 40)}), so no answer can be learnt from it: "
            "name the columns that differ under [data], such as data.prompt or data.input"
        )


# --- the first pass --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """The columns that are read, and what is remembered of every usable row."""

    columns: tuple[str, ...]  # those of the roles, and group
    separator: str | None  # between the labels of a cell
    rename: Mapping[str, str]  # label -> the class that is meant; "": rows with it are left out
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
        if data.rename and not columns.schema.classes:
            raise DataError(f"data.rename needs classes, and {columns.schema.kind} has none: leave it out")
        known = dict(data.rename or {})
        return cls(names, data.separator, known, group is not None, bool(data.drop_duplicates), bool(data.stratify))


@dataclass
class Scan:
    """The counts of one pass over a table, and a number for each usable row where one is wanted."""

    rows: int = 0
    usable: int = 0
    without: Counter[str] = field(default_factory=Counter)  # what rows lack, such as 'text' -> how many
    labels: Counter[str] = field(default_factory=Counter)
    replaced: cells.Replacements = field(default_factory=cells.Replacements)
    wrong: dict[str, str] = field(default_factory=dict)  # column -> the first error in it
    wrong_rows: Counter[str] = field(default_factory=Counter)  # column -> rows with an error in it
    changes: Counter[str] = field(default_factory=Counter)  # what happened -> conversations
    renamed: Counter[str] = field(default_factory=Counter)  # label that `data.rename` names -> rows
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
        count = len(example.in_training())
        self.several += count > 1
        self._references.append(count)
        if wanted.group:
            self._groups.append(self._group(group))
        if wanted.duplicates:
            self._inputs.append(hash_of(example.input.strip()))
            self._pairs.append(hash_of(f"{example.input.strip()}\0{example.output}"))
        if wanted.stratify:
            self._outputs.append(self._combinations.setdefault(example.labels, len(self._combinations)))

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

    def notes(self, table: Table) -> list[str]:
        of = f"of {counted(self.rows, 'row')}"
        lost = [f"{n} {of} without {what} {_is(n)} left out" for what, n in self.without.items()]
        if self.ungrouped:
            own = "is a group of its own" if self.ungrouped == 1 else "are groups of their own"
            lost.append(f"{counted(self.ungrouped, 'row')} without a group {own}")
        if self.several:
            has = "has" if self.several == 1 else "have"
            lost.append(f"{self.several} {of} {has} several references: in training each is an example")
        lost += [f"{what} in {n} of {counted(self.rows, 'conversation')}" for what, n in self.changes.items()]
        return table.left_out_notes() + [f"{table.name}: {note}" for note in [*lost, *self.replaced.notes()]]

    def report(self, table: Table, problems: Problems) -> None:
        """Add what is wrong with the table to `problems`."""
        for column, first in self.wrong.items():
            count = self.wrong_rows[column]
            problems.add(f"{first} ({count} such rows)" if count > 1 else first)
        if not self.rows:
            problems.add(f"{table.name} has columns and no rows: give a table with rows")
        elif not self.usable and not self.wrong:
            lost = " and ".join(f"{n} without {one_line(what, 60)}" for what, n in self.without.items())
            problems.add(f"{table.name} has no usable row: of {self.rows} rows {lost}")


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def scan_of(table: Table, columns: Columns, wanted: Wanted, problems: Problems) -> Scan:
    """Read a table once. Adds what is wrong with it to `problems`."""
    scan = Scan()
    for _ in examples_of(table, columns, wanted, scan, collect=True):
        if len(scan.labels) > cells.MOST_CLASSES:
            cells.check_classes(scan.labels, scan.rows, columns.answer, columns.schema.many)
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
    schema, count = columns.schema, len(columns.roles)
    names = table.classes.get(columns.answer, ())
    reader = cells.RowReader(tuple(columns.roles), names, wanted.separator, wanted.rename, scan.replaced, scan.renamed)
    for place, row in table.read(wanted.columns):
        scan.rows += 1
        reader.begin(row)
        try:
            example = schema.example(reader)
        except cells.Missing:
            scan.without[repr(columns.roles[reader.role])] += 1
        except DataError as error:
            column = columns.roles[reader.role]
            text = f"{table.name} {table.unit} {place}, column {shown(column, 40)}: {error}"
            if not collect:
                raise DataError(text) from None
            scan.wrong.setdefault(column, text)
            scan.wrong_rows[column] += 1
        else:
            scan.labels.update(example.labels)
            scan.remember(wanted, example, row[count] if len(row) > count else None)
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


# --- problems --------------------------------------------------------------------------------------------------------


class Problems:
    """The texts of errors that were found so far."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, text: str) -> None:
        if text not in self._found:
            self._found.append(text)

    def note(self, check: Callable[[], T]) -> T | None:
        """The result of a check; None if it raised a DataError, which is collected."""
        try:
            return check()
        except DataError as error:
            self.add(str(error))
            return None

    def require(self) -> None:
        """Raise one DataError with the first problems and a count of the others, if there are any."""
        if self._found:
            more = len(self._found) - _MOST
            raise DataError("; ".join(_shortened(self._found, _ROOM)) + (f"; and {more} more" if more > 0 else ""))


def _shortened(texts: Sequence[str], room: int) -> list[str]:
    """The first texts, of which the long ones are cut in the middle until all fit.

    Args:
        room: characters of all of them, with two between them.
    """
    shown = list(texts[:_MOST])
    room -= 2 * len(shown)
    for rest, text in zip(range(len(shown), 0, -1), sorted(shown, key=len), strict=True):
        if len(text) > room // rest:  # this one and all longer ones share what is left
            return [one_line(each, max(room // rest, 40)) if len(each) >= len(text) else each for each in shown]
        room -= len(text)
    return shown
