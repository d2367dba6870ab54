"""Reads a source of data into examples, or into the rows of a table that are to be answered.

`read_dataset` reads a table twice, a row at a time. The first pass checks every cell and counts usable rows and labels.
Then the splits are chosen by row number, and the second pass keeps the chosen rows. So `train = 2000` of a table of a
hundred gigabytes keeps 2000 examples. If the examples do not fit in memory, `ExampleStore` keeps them in a file.

One error reports the problems of columns, or those of all cells: the first few, and a count of the others.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from turret.data import cells
from turret.data.columns import (
    Columns,
    Finder,
    Schema,
    align_columns,
    check_unused,
    columns_of,
    fitting_schemas,
    rivals_note,
)
from turret.data.conversations import prompt_in
from turret.data.examples import MEMORY, Dataset, Example, ExampleStore, Input, TextPair
from turret.data.source import canonical_split, open_labelled, open_source
from turret.data.table import CellValue, DataSettings, Size, Table, format_of, require_columns
from turret.data.text_file import lines_of
from turret.errors import DataError, count_of, one_line, quote, quote_all

T = TypeVar("T")
_ROOM = 270  # characters of the error
_MOST = 4  # problems that are named; the others are counted
FEWEST = 10  # training examples; fewer may be equal by chance
CONSTANT = 0.9  # share of the training examples with the same input from which on it counts as constant
LINES = "text"  # the column of a .txt file


def read_dataset(data: DataSettings, schemas: Sequence[Schema], seed: int = 42, *, memory: int = MEMORY) -> Dataset:
    """Read the source, find the columns and choose the splits. The data set's `notes` report every guess.

    Args:
        data: a recipe's `[data]`.
        schemas: of the recipe's task; of all tasks if the columns have to decide which it is.
        seed: of the order of the rows.
        memory: characters of examples that are kept in memory; more go to a temporary file.

    Raises:
        DataError: the source, a column, a cell or a split cannot be used. It names the first problems that were found.
    """
    first = _first_pass(data, schemas)
    columns, schema, notes = first.columns, first.columns.schema, first.notes()
    first.check_groups()
    counts = {split: len(scan.kept) for split, scan in first.scans.items()}
    kinships = {split: scan.kinship(first.spelling) for split, scan in first.scans.items()}
    chosen = choose_rows(data, first.sources, counts, seed, kinships)
    chosen, leak_notes = first.without_leaks(chosen) if data.drop_duplicates else (chosen, [])
    examples = first.read_chosen(chosen, memory)
    labels = cells.in_order(first.classes()) if schema.classes else ()
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
    fitting_schemas(data, [schema])
    tables = open_labelled(data, format_of(data, trained))
    problems = Problems()
    split = problems.note(lambda: test_split(data, list(tables)))
    table = tables[split] if split is not None else next(iter(tables.values()))
    columns = problems.note(lambda: Finder.of(data, table.columns, trained).find([schema]))
    if columns is None and table.hint:
        problems.add(table.hint)
    problems.require()
    assert columns is not None
    _check_settings(data, columns, None)
    scan = Scan(data, columns)
    found = list(scan.examples(table, collect=True))
    scan.report(table, problems)
    spelling = _known_spelling(data, scan.labels, labels) if schema.classes else {}
    unknown = sorted({spelling[label] for label in scan.labels} - set(labels)) if labels else []
    if unknown:
        problems.add(
            f"{table.name} has the label {quote_all(unknown, 40)}, which the adapter does not know: "
            f"it knows {quote_all(labels, 60)}" + ("" if data.normalize_labels else _offer(unknown, labels))
        )
    problems.require()
    places, examples = [place for place, _ in found], [example.respelt(spelling) for _, example in found]
    notes = [*table.notes, *([columns.note] if columns.note else []), *scan.notes(table)]
    if data.test is not None and not isinstance(data.test, str):
        numbers = shuffle_rows(len(examples), seed)[
            : count_taken("test", data.test, len(examples), len(examples), notes)
        ]
        examples, places = [examples[number] for number in numbers], [places[number] for number in numbers]
    return EvaluationRows(examples, places, tuple(notes))


def _known_spelling(data: DataSettings, found: Mapping[str, int], labels: Sequence[str]) -> dict[str, str]:
    """Label -> class that an adapter knows, compared without case and blanks with `data.normalize_labels`."""
    known = {cells.key_of(label): label for label in labels} if data.normalize_labels else {}
    return {label: label if label in labels else known.get(cells.key_of(label), label) for label in found}


def _offer(unknown: Sequence[str], labels: Sequence[str]) -> str:
    keys = {cells.key_of(label) for label in labels}
    alike = all(cells.key_of(label) in keys for label in unknown)
    return "; set data.normalize_labels = true to ignore case and blanks" if alike else ""


# --- rows to be answered ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Args:
        place: the line on which it begins, of a text file; else its number, from 1.
        input: what is asked, "" if the cell is empty.
        cells: all of its cells, in the order of the columns.
    """

    place: int
    input: Input
    cells: tuple[CellValue, ...]


@dataclass(frozen=True)
class Rows:
    """A table whose rows are read one after another.

    Args:
        table: with the columns of each row's cells.
        asked: columns that hold the input.
        read: the rows, from the start.
    """

    table: Table
    asked: tuple[str, ...]
    read: Callable[[], Iterator[Row]]


def read_rows(data: DataSettings, schema: Schema, *, trained: Mapping[str, str] | None = None) -> Rows:
    """The rows of a table, or the lines of a `.txt` file. Raises DataError, also while the rows are read.

    Args:
        trained: role -> column of the table that the adapter was trained on.
    """
    return _rows_of(data, schema, trained, whole=True)


def read_inputs(data: DataSettings, schema: Schema, *, trained: Mapping[str, str] | None = None) -> list[Input]:
    """The input of each row of a table ("" if missing), or the lines of a `.txt` file.

    Args:
        trained: role -> column of the table that the adapter was trained on.

    Raises:
        DataError: the table cannot be read, or a row has only one of two texts.
    """
    rows = _rows_of(data, schema, trained, whole=False)
    two = len(rows.asked) > 1 and not (schema.conversations or schema.converses)
    inputs = list[Input]()
    for row in rows.read():
        if two and row.input == "":
            raise DataError(
                f"{rows.table.name} {rows.table.unit} {row.place} has a blank in {quote_all(rows.asked)}, which are "
                "read together: fill it in, or leave the row out; `turret predict --out` flags such rows instead"
            )
        inputs.append(row.input)
    return inputs


def _rows_of(data: DataSettings, schema: Schema, trained: Mapping[str, str] | None, *, whole: bool) -> Rows:
    """The rows. A column that is not found is an error before the first row.

    Args:
        whole: all columns; else only those of the input.
    """
    path = Path(os.path.expanduser(data.source))
    if path.suffix.lower() == ".txt" and os.path.isfile(path):  # Path.is_file raises for a name that is too long

        def lines() -> Iterator[Row]:
            for place, line in enumerate(lines_of(path, data.encoding), 1):
                yield Row(place, line, (line,))

        return Rows(Table(path.name, (LINES,), lambda _: ((row.place, row.cells) for row in lines())), (LINES,), lines)
    tables = open_source(data.source, format_of(data, trained))
    table = tables[test_split(data, list(tables))]
    try:
        roles = Finder.of(data, table.columns, trained).inputs(schema)
    except DataError as error:
        raise DataError(f"{error}; {table.hint}") if table.hint else error from None
    asked = tuple(roles.values())
    columns = table.columns if whole else asked
    ask = prompt_in if schema.conversations or schema.converses else _texts_in

    def read() -> Iterator[Row]:
        reader = cells.RowReader(tuple(roles))
        places = [columns.index(name) for name in asked]
        for place, row in table.read(columns):
            reader.begin([row[each] for each in places])
            try:
                yield Row(place, ask(reader), row)
            except cells.Missing:
                yield Row(place, "", row)
            except DataError as error:
                column = quote(roles[reader.role], 40)
                raise DataError(f"{table.name} {table.unit} {place}, column {column}: {error}") from None

    return Rows(replace(table, columns=columns), asked, read)


def _texts_in(row: cells.RowReader) -> Input:
    """A text, or two."""
    texts = [row.text(role) for role in row.roles]
    return texts[0] if len(texts) == 1 else TextPair(*texts)


# --- the two passes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FirstPass:
    """What the first pass found out, and the checks and the second pass that follow from it.

    Args:
        tables: by split, with the columns called as in the training table.
        scans: of the tables, by split.
        spelling: label -> class.
    """

    data: DataSettings
    columns: Columns
    sources: Sources
    tables: Mapping[str, Table]
    scans: Mapping[str, Scan]
    spelling: Mapping[str, str]

    @property
    def train(self) -> Scan:
        """The scan of the training table."""
        return self.scans[self.sources.split["train"]]

    def classes(self) -> Counter[str]:
        """The classes of the training table with their rows."""
        return cells.classes_of(self.train.labels, self.spelling)

    def notes(self) -> list[str]:
        """What was guessed, left out and changed. Raises DataError if `data.rename` names a label that no row has."""
        notes = [note for table in self.tables.values() for note in table.notes]
        notes += [self.columns.note] if self.columns.note else []
        notes += [note for split, scan in self.scans.items() for note in scan.notes(self.tables[split])]
        changed = {label: name for label, name in self.spelling.items() if label != name}
        if changed:
            first = min(changed)
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            notes.append(
                f"labels that differ in case or blanks only are one class: {first!r} is {changed[first]!r}{more}"
            )
        notes += self._rename_notes()
        return notes + rivals_note(self.tables[self.sources.split["train"]], self.data, self.columns)

    def _rename_notes(self) -> list[str]:
        counts = sum((scan.reader.renamed for scan in self.scans.values()), Counter[str]())
        notes = []
        for label, meant in (self.data.rename or {}).items():
            if not counts[label]:
                there = {each for scan in self.scans.values() for each in scan.labels}
                raise DataError(
                    f"data.rename names the label {quote(label, 40)}, which no row has: the labels are "
                    f"{quote_all(cells.in_order(there))}"
                )
            instead = f"read as {meant!r}" if meant else "left out"
            notes.append(f"{count_of(counts[label], 'row')} with the label {label!r}: {instead}")
        return notes

    def check_labels(self) -> None:
        """Raise DataError if the labels are no classes, or another split has more of them than the training table."""
        data, column, many = self.data, self.columns.answer, self.columns.schema.many
        problems = Problems()
        alike: set[str] = set()  # keys of labels that are complained of already
        if not data.normalize_labels:
            every = {label for scan in self.scans.values() for label in scan.labels}
            problems.note(lambda: cells.check_alike(every))
            keys = Counter(cells.key_of(label) for label in every)
            alike = {key for key, count in keys.items() if count > 1}
        counts = self.classes()
        own = {column: counts}
        if isinstance(data.label, list):  # each of them is as a column of its own
            own, many = cells.by_column(counts, data.label), False
        for name, classes in own.items():
            if not self.train.wrong:  # rows that are wrong would be missing in the counts
                cells.check_classes(classes, self.train.rows, name, many)
            if data.separator is None:
                problems.note(partial(cells.check_joined, classes, name, many))
        for split, scan in self.scans.items():
            unknown = [x for x in scan.labels if self.spelling[x] not in counts and cells.key_of(x) not in alike]
            if unknown:
                rest = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
                problems.add(
                    f"{self.tables[split].name} has the label {quote(unknown[0])} ({scan.labels[unknown[0]]} rows)"
                    f"{rest}, which the training table lacks: its labels are {quote_all(cells.in_order(counts))}"
                )
        problems.require()

    def check_groups(self) -> None:
        """Raise DataError if two splits of the source share a group."""
        for first, second in itertools.combinations(self.scans if self.data.group else (), 2):
            shared = np.intersect1d(self.scans[first].numbers("group"), self.scans[second].numbers("group"))
            if len(shared):
                raise DataError(
                    f"{self.tables[first].name} and {self.tables[second].name} share {len(shared)} groups of "
                    f"{quote(self.data.group, 40)}: give one table, which data.group splits, or leave data.group out"
                )

    def without_leaks(self, chosen: Chosen) -> tuple[Chosen, list[str]]:
        """The rows without training rows whose input is also a validation or test input, and notes on all drops."""
        split, train = self.sources.split, chosen.rows["train"]
        inputs = {role: self.scans[name].numbers("input")[self.scans[name].kept] for role, name in split.items()}
        held = [inputs[role][chosen.rows[role]] for role in inputs if role != "train"]
        leaks = np.isin(inputs["train"][train], np.concatenate(held)) if held else np.zeros(0, bool)
        notes = [
            f"{count_of(n, 'row')} that {'repeats' if n == 1 else 'repeat'} another one {_is(n)} left out"
            for scan in self.scans.values()
            if (n := scan.usable - len(scan.kept))
        ]
        if leaks.any():
            train = train[~leaks]
            count = int(leaks.sum())
            whose = "its input is" if count == 1 else "their inputs are"
            notes.append(f"{count_of(count, 'training row', 'left out')}, because {whose} held out too")
        if not len(train):
            raise DataError(
                "data.drop_duplicates leaves no training row, because all inputs are held out too: leave it out"
            )
        return Chosen({**chosen.rows, "train": train}, chosen.notes), notes

    def read_chosen(self, chosen: Chosen, memory: int) -> dict[SplitRole, ExampleStore]:
        """Read the chosen rows into their splits. A training row with several references is an example for each."""
        sizes = {role: self._examples_of_rows(chosen, role) for role in ROLES}
        stores = {role: ExampleStore(int(sizes[role].sum()), memory) for role in ROLES}
        for split, table in self.tables.items():
            scan = self.scans[split]
            owner = np.zeros(scan.usable, dtype=np.int8)  # by usable row: 1 + index of its role; 0: not chosen
            place = np.zeros(scan.usable, dtype=np.int64)
            for number, role in enumerate(ROLES, 1):
                if self.sources.split.get(role) == split:
                    rows = scan.kept[chosen.rows[role]]
                    owner[rows] = number
                    place[rows] = np.cumsum(sizes[role]) - sizes[role]
            seen = 0
            for _, example in Scan(self.data, self.columns).examples(table, remember=False):
                if seen < len(owner) and owner[seen]:
                    role = ROLES[owner[seen] - 1]
                    own = example.respelt(self.spelling)
                    for step, each in enumerate(own.in_training() if role == "train" else (own,)):
                        stores[role].put(int(place[seen]) + step, each)
                seen += 1
            if seen != len(owner):
                raise DataError(f"{table.name} changed while it was read: start again when nothing writes to it")
        return {role: store.done() for role, store in stores.items()}

    def _examples_of_rows(self, chosen: Chosen, role: SplitRole) -> npt.NDArray[np.int64]:
        """The number of examples of each chosen row of a role."""
        rows = chosen.rows[role]
        if role != "train":
            return np.ones(len(rows), dtype=np.int64)
        return self.train.numbers("references")[self.train.kept[rows]].astype(np.int64)


def _first_pass(data: DataSettings, schemas: Sequence[Schema]) -> _FirstPass:
    tables, schemas = open_labelled(data, format_of(data)), fitting_schemas(data, schemas)
    problems = Problems()
    sources = problems.note(lambda: find_sources(data, list(tables)))
    train = tables[sources.split["train"] if sources else next(iter(tables))]
    columns = problems.note(lambda: columns_of(train, data, schemas))
    grouped = {} if data.group is None else {"group": data.group}
    group = problems.note(lambda: require_columns(grouped, train.columns).get("group"))
    if columns is None:  # perhaps because the file was read in the wrong way
        for note in [*train.notes, *([train.hint] if train.hint else [])]:
            problems.add(note)
    problems.require()
    assert sources is not None
    assert columns is not None
    check_unused(data, train, columns)
    _check_settings(data, columns, group)
    names = (*columns.roles.values(), *([] if group is None else [group]))
    used = {split: align_columns(tables[split], names) for split in dict.fromkeys(sources.split.values())}
    scans = {split: Scan(data, columns, group) for split in used}
    for split, scan in scans.items():
        for _ in scan.examples(used[split], collect=True):
            if len(scan.labels) > cells.MOST_CLASSES:
                cells.check_classes(scan.labels, scan.rows, columns.answer, columns.schema.many)
        scan.report(used[split], problems)
    counts = sum((scan.labels for scan in scans.values()), Counter[str]())
    spelling = cells.spellings(counts) if data.normalize_labels else {label: label for label in counts}
    found = _FirstPass(data, columns, sources, used, scans, spelling)
    if columns.schema.classes:
        problems.note(found.check_labels)
    problems.require()
    return found


def _check_settings(data: DataSettings, columns: Columns, group: str | None) -> None:
    """Raise DataError for settings that do not go together."""
    if data.stratify and not columns.schema.classes:
        raise DataError(f"data.stratify needs classes, and {columns.schema.kind} has none: leave it out")
    if data.stratify and group is not None:
        raise DataError("data.group and data.stratify cannot be met together: leave one of them out")
    if data.rename and not columns.schema.classes:
        raise DataError(f"data.rename needs classes, and {columns.schema.kind} has none: leave it out")


def _class_notes(labels: Sequence[str], train: Sequence[Example], schema: Schema) -> list[str]:
    """Notes on classes with no or one training example. Raises DataError if there is only one class."""
    counts: Counter[str] = Counter()
    for example in train:
        counts.update(example.labels)
    if not schema.many and len(counts) == 1:
        raise DataError(
            f"all {len(train)} training examples have the label {quote(next(iter(counts)))}: raise data.train"
        )
    notes = []
    if schema.many and not (schema.spans or schema.several) and any("," in label for label in labels):
        notes.append("labels have commas in them: if a comma separates labels, set data.separator")
    for number, word in ((0, "no training example"), (1, "only one training example")):
        found = [label for label in labels if counts[label] == number]
        if found:
            notes.append(f"{word} for the class {quote_all(found)}")
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
                f"{duplicates} of {count_of(len(inputs[role]), f'{role} input')} {occurs} in the training examples too"
            )
    if schema.classes and not schema.many:
        once, with_label = np.unique(train), np.unique(both)
        if len(with_label) > len(once):
            count = len(with_label) - len(once)
            notes.append(
                f"{count_of(count, 'training text')} {'occurs' if count == 1 else 'occur'} with more than one label"
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
            f"{quote(next(iter(found.roles.values())), 40)}), so no answer can be learnt from it: "
            "name the columns that differ under [data], such as data.prompt or data.input"
        )


@dataclass
class Scan:
    """One pass over a table: its counts, and a number for each usable row where the recipe wants one.

    Args:
        group: the column of `data.group`.
    """

    data: DataSettings
    columns: Columns
    group: str | None = None
    rows: int = 0
    usable: int = 0
    reader: cells.RowReader = field(init=False)
    without: Counter[str] = field(default_factory=Counter)  # what rows lack, such as 'text' -> how many
    labels: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, str] = field(default_factory=dict)  # column -> the first error in it
    wrong_rows: Counter[str] = field(default_factory=Counter)  # column -> rows with an error in it
    ungrouped: int = 0
    _numbers: dict[str, array[int]] = field(default_factory=lambda: defaultdict(lambda: array("Q")))
    _combinations: dict[tuple[str, ...], int] = field(default_factory=dict)  # labels of a row -> a number

    def __post_init__(self) -> None:
        self.reader = cells.RowReader(tuple(self.columns.roles), (), self.data.separator, self.data.rename or {})

    def examples(self, table: Table, *, collect: bool = False, remember: bool = True) -> Iterator[tuple[int, Example]]:
        """The usable rows as examples, with their places. Rows with a missing cell are counted.

        Args:
            collect: collect wrong cells in `wrong` and go on; else raise DataError for the first, with its place.
            remember: keep the numbers of usable rows.
        """
        roles, reader = self.columns.roles, self.reader
        reader.names = table.classes.get(self.columns.answer, ())
        names = (*roles.values(), *([] if self.group is None else [self.group]))
        for place, row in table.read(names):
            self.rows += 1
            reader.begin(row)
            try:
                example = self.columns.schema.example(reader)
            except cells.Missing as lacks:
                self.without[f"{lacks}{roles[reader.role]!r}"] += 1
            except DataError as error:
                column = roles[reader.role]
                text = f"{table.name} {table.unit} {place}, column {quote(column, 40)}: {error}"
                if not collect:
                    raise DataError(text) from None
                self.wrong.setdefault(column, text)
                self.wrong_rows[column] += 1
            else:
                self.labels.update(example.labels)
                self.usable += 1
                if remember:
                    self._remember(example, row)
                yield place, example

    def _remember(self, example: Example, row: Sequence[CellValue]) -> None:
        numbers = {"references": len(example.in_training())}
        if self.group is not None:
            numbers["group"] = self._group(row[-1])
        if self.data.drop_duplicates:
            text = example.input.strip()
            numbers |= {"input": hash_of(text), "pair": hash_of(f"{text}\0{example.output}")}
        if self.data.stratify:
            numbers["labels"] = self._combinations.setdefault(example.labels, len(self._combinations))
        for name, number in numbers.items():
            self._numbers[name].append(number)

    def _group(self, cell: CellValue) -> int:
        text = "" if cell is None else str(cell).strip()
        if not text or text == "nan":
            self.ungrouped += 1
            return hash_of(f"row {self.rows}")
        return hash_of(f"group {text}")

    # --- after the pass ---------------------------------------------------------------------------------------------

    def numbers(self, name: Literal["references", "group", "input", "pair", "labels"]) -> npt.NDArray[np.uint64]:
        """What was remembered of each usable row (N,): how many references it has, or a hash."""
        return np.array(self._numbers[name], dtype=np.uint64)

    @cached_property
    def kept(self) -> npt.NDArray[np.int64]:
        """The usable rows, without those that repeat an earlier one if `data.drop_duplicates` asks for that."""
        if not self.data.drop_duplicates:
            return np.arange(self.usable)
        return np.sort(np.unique(self.numbers("pair"), return_index=True)[1])

    def kinship(self, spelling: Mapping[str, str]) -> Kinship:
        """Classes and groups of the kept rows. A row with several labels counts as one of its rarest label."""
        groups = None if self.group is None else self.numbers("group")[self.kept]
        if not self.data.stratify:
            return Kinship(groups=groups)
        counts = cells.classes_of(self.labels, spelling)
        by_rarity = sorted(counts, key=lambda label: (counts[label], label))
        numbers = {label: number for number, label in enumerate(by_rarity)}
        rarest = [min((numbers[spelling[label]] for label in each), default=-1) for each in self._combinations]
        return Kinship(np.array(rarest, dtype=np.int64)[self.numbers("labels")[self.kept].astype(np.int64)], groups)

    def notes(self, table: Table) -> list[str]:
        of = f"of {count_of(self.rows, 'row')}"
        lost = [f"{n} {of} without {what} {_is(n)} left out" for what, n in self.without.items()]
        if self.ungrouped:
            own = "is a group of its own" if self.ungrouped == 1 else "are groups of their own"
            lost.append(f"{count_of(self.ungrouped, 'row')} without a group {own}")
        if several := int((self.numbers("references") > 1).sum()):
            has = "has" if several == 1 else "have"
            lost.append(f"{several} {of} {has} several references: in training each is an example")
        lost += [f"{what} in {n} of {count_of(self.rows, 'conversation')}" for what, n in self.reader.changes.items()]
        replaced = [f"{count_of(count, 'text')} {what}" for what, count in self.reader.replaced.items()]
        return table.left_out_notes() + [f"{table.name}: {note}" for note in [*lost, *replaced]]

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
            raise DataError("; ".join(_shorten_texts(self._found, _ROOM)) + (f"; and {more} more" if more > 0 else ""))


def _shorten_texts(texts: Sequence[str], room: int) -> list[str]:
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


# --- splits -----------------------------------------------------------------------------------------------------------
# Chooses the training, validation and test rows from the numbers of rows and a seed.
#
# - A split that the recipe names is used whole.
# - A number or a fraction is taken from the split of that name if the source has one, else from the training table.
# - Defaults: for test the test split, else a fifth of the training table, at most `MOST_TEST` rows; for validation the
#   validation split, else none; for train all remaining rows.
# - Rows are shuffled with the seed. Test rows are taken first, then validation rows, then training rows, so the test
#   examples do not depend on the number of training examples.
# - With `data.stratify` every split has the same shares of the classes. With `data.group` all rows of a group go to one
#   split.


SplitRole = Literal["train", "validation", "test"]
ROLES: tuple[SplitRole, ...] = ("train", "validation", "test")
MOST_TEST = 1000
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Sources:
    """The split of the source that each role reads."""

    split: dict[SplitRole, str]  # role -> name of the split; without roles that have no examples
    carved: tuple[SplitRole, ...]  # roles that take their rows from the training table


@dataclass(frozen=True)
class Chosen:
    """Row numbers among the usable rows of a split, in the order of the examples."""

    rows: dict[SplitRole, npt.NDArray[np.int64]]
    notes: tuple[str, ...]


def find_sources(data: DataSettings, splits: Sequence[str]) -> Sources:
    """The split of each role, by the names of the source's splits. Raises DataError.

    Args:
        data: a recipe's `[data]`.
        splits: names of the source's splits.
    """
    sizes = {role: getattr(data, role) for role in ROLES}
    named: dict[SplitRole, str] = {
        role: _lookup(role, size, splits) for role, size in sizes.items() if isinstance(size, str)
    }
    twice = [role for role in named if list(named.values()).count(named[role]) > 1]
    if twice:
        raise DataError(f"{' and '.join(twice)} are both the split {quote(named[twice[0]])}: name different splits")
    free = {canonical_split(split): split for split in reversed(splits) if split not in named.values()}
    train = named.get("train") or free.get("train") or (splits[0] if len(splits) == 1 and not named else None)
    if train is None:
        raise DataError(f"there is no training split: the splits are {quote_all(splits)}, so name one in data.train")
    found: dict[SplitRole, str] = {"train": train}
    carved: list[SplitRole] = []
    for role in ("test", "validation"):
        split = named.get(role) or free.get(role)
        if split is not None and split != train:
            found[role] = split
        elif role == "test" or sizes[role] is not None:
            found[role] = train
            carved.append(role)
    return Sources(found, tuple(carved))


def test_split(data: DataSettings, splits: Sequence[str]) -> str:
    """The split to evaluate on: the named one, else the test split, else the only one, else validation."""
    if isinstance(data.test, str):
        return _lookup("test", data.test, splits)
    free = {canonical_split(split): split for split in reversed(splits)}
    for split in ("test", "validation"):
        if split in free or len(splits) == 1:
            return free.get(split, splits[0])
    raise DataError(f"which split to evaluate on? The splits are {quote_all(splits)}: name one in data.test")


def _lookup(role: SplitRole, name: str, splits: Sequence[str]) -> str:
    if name in splits and name:
        return name
    for split in splits:
        if split and canonical_split(split) == canonical_split(name):
            return split
    there = f"the splits are {quote_all(splits)}" if any(splits) else "the source is one table without splits"
    raise DataError(f"data.{role} = {quote(name)}, but {there}: give a number, a fraction, or one of the splits")


@dataclass(frozen=True)
class Kinship:
    """What the usable rows of one split have in common, as far as it decides where they go."""

    classes: npt.NDArray[np.int64] | None = None  # the class of each row, for `data.stratify`
    groups: npt.NDArray[np.uint64] | None = None  # the group of each row, for `data.group`


def choose_rows(
    data: DataSettings,
    sources: Sources,
    counts: Mapping[str, int],
    seed: int,
    kin: Mapping[str, Kinship] | None = None,
) -> Chosen:
    """Choose the rows of each role. Raises DataError if none are left to train on.

    Args:
        counts: number of usable rows, by split.
        kin: classes and groups of the rows, by split.
    """
    notes: list[str] = []
    rows: dict[SplitRole, npt.NDArray[np.int64]] = {}
    kin = kin or {}
    train = sources.split["train"]
    own = kin.get(train, Kinship())
    order = arrange_rows(counts[train], seed, own)
    start = 0
    for role in ("test", "validation"):
        if role not in sources.split:
            rows[role] = order[:0]
        elif role in sources.carved:
            count = _carved_count(getattr(data, role), counts[train], notes)
            end = start + count if own.groups is None else _end_of_group(own.groups[order], start + count)
            rows[role] = order[start:end]
            start = end
        else:
            split = sources.split[role]
            count = count_taken(role, getattr(data, role), counts[split], counts[split], notes)
            rows[role] = arrange_rows(counts[split], seed, kin.get(split, Kinship()))[:count]
    left = counts[train] - start
    if left < 1 and own.groups is not None and start:
        raise DataError(
            f"data.group = {quote(data.group, 40)}: the {len(np.unique(own.groups))} groups cannot be split so that "
            "one is left to train on: lower data.test and data.validation, or leave data.group out"
        )
    if left < 1:
        raise DataError(
            f"{counts[train]} usable rows and {start} of them held out leave none to train on: "
            "give more rows, or lower data.test and data.validation"
        )
    rows["train"] = order[start : start + count_taken("train", data.train, counts[train], left, notes)]
    return Chosen({role: rows[role] for role in ROLES}, tuple(notes))


def arrange_rows(count: int, seed: int, kin: Kinship) -> npt.NDArray[np.int64]:
    """The order in which the rows of a split are taken: shuffled, every part with the same classes, groups together.

    For classes, row i of the n_c rows of class c gets the place (i + 1/2) / n_c, and rows are sorted by their places.
    So every stretch of the order has each class in its share of the table, to within about one row for each class.
    """
    order = shuffle_rows(count, seed)
    if kin.groups is not None:
        groups, group_of = np.unique(kin.groups, return_inverse=True)
        rank = shuffle_rows(len(groups), seed)
        return order[np.argsort(rank[group_of[order]], kind="stable")]
    if kin.classes is not None:
        places = np.zeros(count)
        for each in np.unique(kin.classes):
            members = order[kin.classes[order] == each]
            places[members] = (np.arange(len(members)) + 0.5) / len(members)
        return order[np.argsort(places[order], kind="stable")]
    return order


def _end_of_group(groups: npt.NDArray[np.uint64], end: int) -> int:
    """The first place from `end` on where a new group begins; if that is the end of the rows, the last one before it.

    Args:
        groups: of the rows in their order.
    """
    begins = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    after, before = begins[begins >= end], begins[begins < end]
    if len(after):
        return int(after[0])
    return int(before[-1]) if len(before) else len(groups)


def shuffle_rows(count: int, seed: int) -> npt.NDArray[np.int64]:
    """A permutation of `count` numbers that never changes for a seed."""
    # RandomState's stream is frozen. A Generator's may change with numpy, and the test set with it.
    return np.random.RandomState(seed).permutation(count)


def _carved_count(size: Size, total: int, notes: list[str]) -> int:
    if size is None or isinstance(size, str):  # only the test split is carved without a size
        count = min(MOST_TEST, max(1, round(TEST_SHARE * total)))
        notes.append(f"no test split and none asked for: {count} of {total} rows are held out for the test")
        return count
    return max(1, round(size * total)) if isinstance(size, float) else size


def count_taken(role: SplitRole, size: Size, total: int, left: int, notes: list[str]) -> int:
    """The number of rows to take of those that are left. A note reports if there are fewer than asked for.

    Args:
        total: rows that a fraction refers to.
    """
    if size is None or isinstance(size, str):
        return left
    count = max(1, round(size * total)) if isinstance(size, float) else size
    if count > left:
        notes.append(f"{role}: {count} examples asked for, {left} are there, all of them are used")
    return min(count, left)
