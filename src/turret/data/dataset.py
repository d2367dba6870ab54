"""Reads a source of data into examples. The entry is `read`.

A table is read twice, a row at a time. The first pass checks every cell and counts usable rows and labels. Then the
splits are chosen by row number, and the second pass keeps the chosen rows. So `train = 2000` of a table of a hundred
gigabytes keeps 2000 examples. If the examples do not fit in memory, `ExampleStore` keeps them in a temporary file.

One error reports all problems of a source.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from turret.data import cells
from turret.data.columns import Columns, Schema, aligned, find_columns, find_group
from turret.data.example_store import MEMORY, ExampleStore
from turret.data.examples import Dataset, Example, Labelled, Pair
from turret.data.problems import Problems
from turret.data.rows import numbered
from turret.data.scan import Scan, Wanted, examples_of, hash_of, scan_of
from turret.data.settings import DataSettings, format_of
from turret.data.source import open_source
from turret.data.splits import ROLES, Chosen, Sources, SplitRole, choose, find_sources, shuffled, taken, test_split
from turret.data.table import Table
from turret.data.unused_inputs import check_unused, check_varied
from turret.errors import DataError, listed, shown


def read(data: DataSettings, schemas: Sequence[Schema], seed: int = 42, *, memory: int = MEMORY) -> Dataset:
    """Read the source, find the columns and choose the splits. The data set's `notes` report every guess.

    Args:
        data: a recipe's `[data]`.
        schemas: of the recipe's task; of all tasks if the columns have to decide which it is.
        seed: of the order of the rows.
        memory: characters of examples that are kept in memory; more go to a temporary file.

    Raises:
        DataError: the source, a column, a cell or a split cannot be used. It names every problem that was found.
    """
    tables = open_source(data.source, format_of(data))
    problems = Problems()
    sources = problems.note(lambda: find_sources(data, list(tables)))
    train = tables[sources.split["train"] if sources else next(iter(tables))]
    columns = problems.note(lambda: find_columns(data, train.columns, schemas))
    group = problems.note(lambda: find_group(data, train.columns))
    if columns is None:  # perhaps because the file was read in the wrong way
        for note in train.notes:
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
    notes += [note for split, scan in scans.items() for note in scan.notes(used[split].name)]
    notes += _spelling_notes(spelling)
    labels = (
        cells.in_order({spelling[label] for label in scans[sources.split["train"]].labels}) if schema.classes else ()
    )
    _check_groups(data, scans, used)
    counts = {split: scan.rows_kept for split, scan in scans.items()}
    chosen = choose(data, sources, counts, seed, {split: scan.kinship(spelling) for split, scan in scans.items()})
    chosen, leak_notes = _without_leaks(chosen, sources, scans) if data.drop_duplicates else (chosen, [])
    examples = _read_chosen(used, sources, chosen, columns, wanted, scans, spelling, memory)
    if schema.classes:
        notes += _class_notes(labels, examples["train"], schema.many)
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
    tables = open_source(data.source, format_of(data))
    problems = Problems()
    split = problems.note(lambda: test_split(data, list(tables)))
    table, last_place = numbered(tables[split] if split is not None else next(iter(tables.values())))
    columns = problems.note(lambda: find_columns(data, table.columns, [schema], trained=trained))
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
    examples = [_respelt(example, spelling) for example in rows]
    notes = [*table.notes, *([columns.note] if columns.note else []), *scan.notes(table.name)]
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


def _check_labels(
    data: DataSettings,
    scans: Mapping[str, Scan],
    used: Mapping[str, Table],
    sources: Sources,
    columns: Columns,
    spelling: Mapping[str, str],
) -> None:
    """Raise DataError if the labels are no classes, or another split has more of them than the training table."""
    train, column, many = sources.split["train"], columns.pair[1], columns.schema.many
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
    if not scans[train].wrong:  # rows that are wrong would be missing in the counts
        cells.check_classes(counts, scans[train].rows, column, many)
    if data.separator is None:
        problems.note(lambda: cells.check_joined(counts, column, many))
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
    notes = [f"{n} rows that repeat another one are left out" for scan in scans.values() if (n := scan.repeated)]
    if leaks.any():
        train = train[~leaks]
        notes.append(f"{int(leaks.sum())} training rows are left out, because their input is held out too")
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
                for step, each in enumerate(_examples_of_row(_respelt(example, spelling), role)):
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


def _examples_of_row(example: Example, role: SplitRole) -> list[Example]:
    if role == "train" and isinstance(example, Pair) and example.others:
        return [Pair(example.source, reference) for reference in example.references]
    return [example]


def _respelt(example: Example, spelling: Mapping[str, str]) -> Example:
    """The example with the classes that its labels mean."""
    if not isinstance(example, Labelled):
        return example
    if isinstance(example.label, tuple):
        return Labelled(example.text, tuple(sorted({spelling[label] for label in example.label})))
    return Labelled(example.text, spelling[example.label])


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
            notes.append(f"{duplicates} of {len(inputs[role])} {role} inputs occur in the training examples too")
    if schema.classes and not schema.many:
        once, with_label = np.unique(train), np.unique(both)
        if len(with_label) > len(once):
            notes.append(f"{len(with_label) - len(once)} training texts occur with more than one label")
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
            output = example.output
            others = example.others if isinstance(example, Pair) else ()
            for value in (example.input, *(output if isinstance(output, tuple) else (output,)), *others):
                raw = str(value).encode()
                digest.update(f"{len(raw)}:".encode() + raw)
            digest.update(b"\n")
    return f"sha256:{digest.hexdigest()}"
