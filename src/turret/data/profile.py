"""Looks at the first rows of a table: which columns hold texts, classes or lists, and what to train on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from turret.data import cells
from turret.data.columns import (
    COMPLETED,
    LABELLED,
    PAIR_ROLES,
    Columns,
    Schema,
    find_columns,
    named_columns,
    refuse_later,
)
from turret.data.table import CellValue, DataSettings, Table
from turret.errors import DataError, listed

LOOKED_AT = 5000  # rows
_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)*%?")
_FRACTION = re.compile(r"[+-]?[0-9]*[.,](?!0+$)[0-9]+")
_DATE = re.compile(r"[0-9]{1,4}[-./][0-9]{1,2}[-./][0-9]{1,4}([ T].*)?")
_WHO = re.compile(
    r"(user|kunde|customer|client|patient|author|autor|account|konto|session|group|gruppe|person)", re.IGNORECASE
)


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
    values: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)

    def add(self, cell: CellValue) -> None:
        if isinstance(cell, (list, tuple)):
            self.filled += bool(cell)
            self.lists += 1
            self.values.update(str(each) for each in cell)
            turns = [each for each in cell if isinstance(each, dict)]
            self.lengths += [len(str(turns))] if turns else [len(str(each)) for each in cell]
            return
        text = "" if cell is None or cell != cell else str(cell).strip()  # NaN is not equal to itself
        if not text:
            return
        self.filled += 1
        self.length += len(text)
        self.lengths.append(len(text))
        self.words += len(text.split())
        self.numbers += bool(_NUMBER.fullmatch(text))
        self.dates += bool(_DATE.fullmatch(text))
        self.values[text] += 1

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


@dataclass(frozen=True)
class Profile:
    """What a table shows, and how Turret would learn from it."""

    rows: int  # that were looked at
    more: bool  # whether the table has more
    kind: str  # of the task
    roles: dict[str, str]  # role -> column
    facts: dict[str, ColumnFacts]  # by column
    guessed: bool  # from the content of columns, not from their names
    multi_label: bool = False
    separator: str | None = None  # between the labels of a cell
    alike: bool = False  # labels that differ in case or blanks only
    repeated: int = 0  # rows that are equal to an earlier one
    groups: tuple[str, ...] = ()  # columns that may say which rows belong together
    classes: dict[str, int] = field(default_factory=dict)  # label -> rows

    @property
    def others(self) -> list[str]:
        """Columns that are not used."""
        return [name for name in self.facts if name not in self.roles.values()]


def profile(table: Table, data: DataSettings, schemas: Sequence[Schema]) -> Profile:
    """Look at a table.

    Args:
        data: what is known already: named columns, `separator`.
        schemas: of the tasks that may suit.

    Raises:
        DataError: there is nothing that a task could learn from, or the wrong column is named.
    """
    facts = {name: ColumnFacts(name) for name in table.columns}
    rows = 0
    for _, row in islice(table.read(table.columns), LOOKED_AT):
        rows += 1
        for column, cell in zip(facts.values(), row, strict=True):
            column.add(cell)
    if not rows:
        raise DataError(f"{table.name} has columns and no rows: give a table with rows")
    columns, guessed = _columns(table, data, schemas, facts)
    found = Profile(rows, rows == LOOKED_AT, columns.schema.kind, columns.roles, facts, guessed)
    found = replace(found, repeated=_repeated(table, columns), groups=_groups(found))
    return _with_labels(found, data, columns) if columns.schema.classes else found


def _columns(
    table: Table, data: DataSettings, schemas: Sequence[Schema], facts: dict[str, ColumnFacts]
) -> tuple[Columns, bool]:
    """The columns by their names, else by their content; and whether they were guessed from it."""
    try:
        return find_columns(data, table.columns, schemas), False
    except DataError:
        named = bool(named_columns(data, PAIR_ROLES))
        refuse_later(table.columns, [schema.kind for schema in schemas])
        if named:
            raise
    texts = sorted((each for each in facts.values() if each.is_texts), key=lambda each: -each.mean)
    classes = [each for each in facts.values() if each.is_classes and each not in texts[:1]]
    classes.sort(key=lambda each: (each.numbers > 0, bool(_WHO.search(each.name)), len(each.values)))
    labelled = next((each for each in schemas if LABELLED in each.names and each.classes), None)
    if texts and classes and labelled is not None:
        return Columns(labelled, {"text": texts[0].name, "label": classes[0].name}, None), True
    written = next((each for each in schemas if each.usual == COMPLETED), None)
    if len(texts) > 1 and written is not None:
        pair = [name for name in table.columns if name in (texts[0].name, texts[1].name)]
        return Columns(written, {"prompt": pair[0], "completion": pair[1]}, None), True
    raise DataError(
        f"{table.name} shows no column of texts with one of classes or answers; the columns are "
        f"{listed(table.columns, 60)}: name them with --text and --label, or --prompt and --completion"
    )


def _repeated(table: Table, columns: Columns) -> int:
    pairs = Counter(tuple(map(str, row)) for _, row in islice(table.read(tuple(columns.roles.values())), LOOKED_AT))
    return sum(count - 1 for count in pairs.values())


def _groups(found: Profile) -> tuple[str, ...]:
    """Unused columns whose names say who a row is about, and whose values recur."""
    return tuple(
        name
        for name in found.others
        if _WHO.search(name) and 2 < len(found.facts[name].values) < 0.9 * found.facts[name].filled
    )


def _with_labels(found: Profile, data: DataSettings, columns: Columns) -> Profile:
    facts = found.facts[columns.pair[1]]
    counts = Counter({label: count for label, count in facts.values.items() if label.strip()})
    many, separator = bool(facts.lists), data.separator
    if not many and separator is None and (joined := cells.joined_by(counts)) is not None:
        separator, many = joined[0], True
    if separator:
        parts: Counter[str] = Counter()
        for label, count in counts.items():
            parts.update({part.strip(): count for part in label.split(separator) if part.strip()})
        counts = parts
    spellings = cells.spellings(counts)
    classes: Counter[str] = Counter()
    for label, count in counts.items():
        classes[spellings[label]] += count
    alike = any(label != name for label, name in spellings.items())
    return replace(
        found, multi_label=many, separator=separator or None, alike=alike, classes=dict(classes.most_common())
    )
