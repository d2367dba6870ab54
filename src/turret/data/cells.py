"""Reads a table's cells as texts and labels.

- A cell is missing if it is None, NaN, or blanks only. Rows without input, target or label are left out and counted.
- Labels are words: `1.0` becomes `1`, true and false become `true` and `false`, surrounding blanks are removed.
- A number with a fraction is refused as a label, also with a decimal comma. Labels that differ only in case or blanks
  are refused by name, or made one by `data.normalize_labels`.
- With `multi_label` a cell is a list, or a text that is a JSON list or has `data.separator` (by default `|`) between
  its labels; `[]` is no label. Without it, labels that look like several joined ones are refused.
- In a text, NUL becomes a blank and a lone surrogate U+FFFD; both are counted. In a label both are refused.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from typing import TypeVar

from turret.data.examples import Span, TextPair
from turret.data.table import BETWEEN, FIELD_LIMIT, Answers, CellValue, answer_to, is_missing, trim_text, words_in
from turret.errors import DataError, quote, quote_all
from turret.json_types import JsonValue

MOST_CLASSES = 10_000
LABEL_LIMIT = 1000  # characters
_MOST_COMPARED = 300  # classes among which typos are looked for
_WHOLE = re.compile(r"([+-]?[0-9]+)(\.0+|,00?)")
_FRACTION = re.compile(r"[+-]?[0-9]*[.,][0-9]+([eE][+-]?[0-9]+)?")
_JOINS = ("|", ";", ",", "/", "+", "&")  # what people put between several labels in a cell
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_LIST = "starts like a JSON list, but is not one"

Label = str | tuple[str, ...]
T = TypeVar("T")

NO_VALUES = words_in(  # what people and programs write into a cell that has no value
    """n/a, #n/a, na, n.a., n. a., nan, null, none, nil, -, --, ---, –, —, ?, ??, tbd, unknown,
    k.a., k. a., keine angabe, unbekannt, leer, n.d., nd, inconnu, non renseigné, s/d, sin datos, desconocido,
    non disponibile, sconosciuto, onbekend, n.v.t., desconhecido, b/d, b.d., brak, brak danych,
    (blank), (leer), (vide), #ref!, #value!"""
)


class Missing(Exception):
    """A row lacks a value that an example needs. Its text goes before the name of the column."""


def text_of(cell: CellValue, replaced: Counter[str] | None = None) -> str | None:
    """The text in a cell; None if it is missing. Replaced characters are counted in `replaced`. Raises DataError."""
    replaced = Counter() if replaced is None else replaced
    if isinstance(cell, str):
        text = cell
    elif is_missing(cell):
        return None
    elif isinstance(cell, (int, float)):
        text = _digits(cell)
    elif isinstance(cell, (date, time)):  # a spreadsheet makes a date of 3/4
        text = cell.isoformat()
        replaced["were a date or a time, which is read as such a text: 2025-03-04"] += 1
    else:
        raise DataError(f"expected text, found {type(cell).__name__}")
    if len(text) > FIELD_LIMIT:
        raise DataError(
            f"a text of {len(text)} characters, the limit is {FIELD_LIMIT}: shorten it or leave the row out"
        )
    if "\0" in text:
        text = text.replace("\0", " ")
        replaced["had NUL characters, which became blanks"] += 1
    if not text.isascii() and _SURROGATE.search(text):
        text = _SURROGATE.sub("\ufffd", text)
        replaced["had half characters, which became U+FFFD"] += 1
    return text if text.strip() else None


def number_of(cell: CellValue) -> float | None:
    """The number in a cell, also with a decimal comma; None if it is missing. Raises DataError."""
    text = trim_text(cell) if isinstance(cell, str) else cell
    if is_missing(text) or (isinstance(text, str) and key_of(text) in NO_VALUES):
        return None
    try:
        if isinstance(text, bool) or not isinstance(text, (int, float, str)):
            raise ValueError
        number = float(text.replace(",", ".") if isinstance(text, str) and text.count(",") == 1 else text)
        if not math.isfinite(number) or (isinstance(text, str) and "_" in text):
            raise ValueError
    except (ValueError, OverflowError):
        raise DataError(f"expected a number such as 3.5, found {quote(str(cell), 40)}") from None
    return number


def words_of(cell: CellValue, replaced: Counter[str] | None = None) -> str | None:
    """The words in a cell with blanks between them; None if there are none. Raises DataError."""
    words = _words(cell, replaced)
    return " ".join(filter(None, words)) or None


def _words(cell: CellValue, replaced: Counter[str] | None = None) -> list[str]:
    """The words of a list, of a JSON list, or between blanks; "" for one that is missing."""
    found = _cell_items(cell)
    if found is None:
        return []
    return ["_".join((text_of(each, replaced) or "").split()) for each in found]


def _cell_items(cell: CellValue) -> Sequence[CellValue] | None:
    """The items of a list, of a text that is a JSON list, or between blanks; None if the cell is missing."""
    if is_missing(cell):
        return None
    found = cell
    if isinstance(cell, str):
        found = json_in(cell, _JSON_LIST) if cell.lstrip().startswith("[") else cell.split()
    if not isinstance(found, (list, tuple)):
        raise DataError(f"expected a list, found {type(found).__name__}")
    return found


def json_in(text: str, wrong: str) -> JsonValue:
    """The value of a text. Raises DataError, which says what is wrong with it, if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{quote(text, 40)} {wrong}") from None


def texts_in(cell: CellValue, replaced: Counter[str] | None = None) -> str | tuple[str, ...] | None:
    """The text in a cell, or the texts of a list of references; None if it is missing. Raises DataError."""
    if not isinstance(cell, (list, tuple)):
        return text_of(cell, replaced)
    texts = dict.fromkeys(text for each in cell if (text := text_of(each, replaced)) is not None)
    return tuple(texts) or None


def label_of(cell: CellValue, names: Sequence[str], multi_label: bool) -> Label | None:
    """The label or labels in a cell; None if they are missing. Raises DataError.

    Args:
        names: the names of class numbers, if the table has them.
    """
    if isinstance(cell, str) and multi_label:
        cell = _several(cell)
    if not isinstance(cell, (list, tuple)):
        one = _one_label(cell, names)
        return one if one is None or not multi_label else (one,)
    if not multi_label and len(cell) < 2:  # as tools for annotation write one label
        return _one_label(cell[0], names) if cell else None
    if not multi_label:
        raise DataError(f"the label is a list ({quote(cell, 40)}): set task.multi_label = true")
    labels = [label for item in cell if (label := _one_label(item, names)) is not None]
    return tuple(sorted(set(labels)))


def _several(text: str) -> CellValue:
    if not text.strip():
        return None
    if text.lstrip().startswith("["):
        return json_in(text, _JSON_LIST)
    return [part.strip() for part in text.split("|")]


def _one_label(cell: CellValue, names: Sequence[str]) -> str | None:
    if is_missing(cell):
        return None
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, (int, float)):
        return _label_by_number(cell, names)
    if not isinstance(cell, str):
        raise DataError(f"expected a label, found {type(cell).__name__}")
    text = _checked_label(trim_text(cell))
    if whole := _WHOLE.fullmatch(text):
        return whole.group(1)
    if _FRACTION.fullmatch(text):
        several = " (or is it several labels? set task.multi_label)" if "," in text else ""
        raise DataError(f"the label {quote(text, 40)} is a fraction: classes are whole numbers or words{several}")
    return text or None


def _label_by_number(number: float, names: Sequence[str]) -> str | None:
    if isinstance(number, float) and not number.is_integer():  # also NaN and infinity
        raise DataError(f"the label {number} is not a whole number: classes are whole numbers or words")
    index = int(number)
    if not names:
        return _checked_label(_digits(index))
    if index == -1:  # how `datasets` writes "no label"
        return None
    if not 0 <= index < len(names):
        raise DataError(f"the label {quote(index, 40)} has no name: the names are {quote_all(names)}")
    return _checked_label(names[index])


def _digits(number: float) -> str:
    try:
        return str(number)
    except ValueError:
        raise DataError("a whole number of thousands of digits: expected text or a label; correct it") from None


def _checked_label(text: str) -> str:
    if len(text) > LABEL_LIMIT:
        raise DataError(f"a label of {len(text)} characters, the limit is {LABEL_LIMIT}: is this the column of labels?")
    if "\0" in text or _SURROGATE.search(text):
        raise DataError(f"the label {quote(text, 40)} has NUL or half characters: correct it")
    return text


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in order: whole numbers by size, then words alphabetically."""
    return tuple(sorted(labels, key=lambda x: (0, int(x), x) if re.fullmatch(r"[+-]?[0-9]{1,18}", x) else (1, 0, x)))


def split_labels(cell: CellValue, separator: str | None) -> CellValue:
    """A cell of several labels as a list, if a recipe names what separates them. JSON lists stay as they are."""
    if not separator or not isinstance(cell, str) or not cell.strip() or cell.lstrip().startswith("["):
        return cell
    return [part for part in cell.split(separator) if part.strip()]


def key_of(label: str) -> str:
    """Equal for labels that differ in case, blanks or the composition of letters only. Turkish has two letters i."""
    low = unicodedata.normalize("NFC", " ".join(label.split())).casefold()
    return low if low.isascii() else low.replace("i\u0307", "i").replace("ı", "i")


def spellings(counts: Mapping[str, int]) -> dict[str, str]:
    """Label -> its class: the most frequent spelling, of those that differ in case or blanks only."""
    best: dict[str, str] = {}
    for label in sorted(counts, key=lambda each: (-counts[each], sum(map(str.isupper, each)), each)):
        best.setdefault(key_of(label), label)
    return {label: best[key_of(label)] for label in counts}


def classes_of(labels: Mapping[str, int], spelling: Mapping[str, str]) -> Counter[str]:
    """The rows of each class, of the rows of each label."""
    counts: Counter[str] = Counter()
    for label, count in labels.items():
        counts[spelling[label]] += count
    return counts


def check_alike(labels: Iterable[str]) -> None:
    """Raise DataError for labels that differ only in case or blanks, which would become two classes."""
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        groups.setdefault(key_of(label), []).append(label)
    alike = [group for group in groups.values() if len(group) > 1]
    if alike:
        more = f", and so do {len(alike) - 1} other groups" if len(alike) > 1 else ""
        raise DataError(
            f"the labels {' and '.join(quote(each, 40) for each in alike[0][:3])} differ in case or blanks only{more}: "
            "set data.normalize_labels = true, or write them alike in the table"
        )


def typos(counts: Mapping[str, int]) -> dict[str, str]:
    """Rare label -> the common label that it is probably a misspelling of.

    A label is rare if a common one has five times its rows. The two differ by one letter, or two letters next to each
    other are swapped; by two of these if they have eight letters or more. Digits differ on purpose: `level 1`.
    """
    found: dict[str, str] = {}
    if len(counts) > _MOST_COMPARED:
        return found
    common = sorted(counts, key=lambda label: -counts[label])
    for rare in reversed(common):
        key = key_of(rare)
        for label in common:
            other = key_of(label)
            if counts[label] < 5 * counts[rare]:
                break
            most = 2 if len(key) >= 8 else 1 if len(key) >= 4 else 0
            apart = _digits_in(key) == _digits_in(other) and abs(len(key) - len(other)) <= most
            if apart and 0 < distance(key, other) <= most:
                found[rare] = label
                break
    return found


def _digits_in(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def distance(first: str, second: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours that make one text of the other.

    Source: the optimal string alignment distance.
    """
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, last, row = row, before, [i] * (len(second) + 1)
        for j, b in enumerate(second, 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and b == first[i - 2]:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]


def no_values(counts: Mapping[str, int]) -> list[str]:
    """Labels that people write if there is no label, such as `N/A`."""
    return [label for label in counts if key_of(label) in NO_VALUES]


def suggest_renames(counts: Mapping[str, int]) -> dict[str, str]:
    """What `data.rename` should probably be: typos get the label that is meant, `N/A` and its like are left out."""
    return {**typos(counts), **dict.fromkeys(no_values(counts), "")}


def doubtful_labels(counts: Mapping[str, int]) -> list[str]:
    """A sentence on each class that is probably a typo or no class."""
    meant = typos(counts)
    found = [f"{quote(rare, 40)} ({counts[rare]}) looks like {quote(label, 40)}" for rare, label in meant.items()]
    return found + [f"{quote(label, 40)} ({counts[label]}) looks like no label" for label in no_values(counts)]


def rename_label(label: Label, rename: Mapping[str, str]) -> Label | None:
    """The label that `data.rename` gives; None if it leaves the label out."""
    if isinstance(label, str):
        return rename.get(label, label) or None
    return tuple(sorted({name for each in label if (name := rename.get(each, each))}))


def joined_by(labels: Iterable[str]) -> tuple[str, str] | None:
    """The separator of labels that look like several joined ones, and an example; None if none do.

    Labels with a separator look joined if each of their parts is a label of its own. If there are several of them, they
    also do if their parts and the labels without a separator are together no more than all labels.
    """
    every = set(labels)
    for mark in _JOINS:
        several = {label for label in every if mark in label.strip(mark)}
        parts = {part.strip() for label in several for part in label.split(mark) if part.strip()}
        single = every - several
        if several and (parts <= single or (len(several) > 1 and len(parts | single) <= len(every))):
            return mark, min(several)
    return None


def check_joined(labels: Iterable[str], column: str, multi_label: bool) -> None:
    """Raise DataError for labels that look like several in one cell: each combination would become a class."""
    every = list(labels)
    found = joined_by(every)
    if found is None:
        return
    mark, example = found
    set_both = f'data.separator = "{mark}"' + ("" if multi_label else " and task.multi_label = true")
    raise DataError(
        f"column {quote(column, 40)} has several labels in a cell, such as {quote(example, 40)}: set {set_both}, "
        f'or data.separator = "" to take them as {len(every)} classes'
    )


def check_classes(counts: Mapping[str, int], rows: int, column: str, multi_label: bool) -> None:
    """Raise DataError if there are no classes, one, or nearly as many as rows."""
    if not multi_label and len(counts) == 1:
        raise DataError(
            f"column {quote(column)} has one class, {quote(next(iter(counts)))}: a classifier needs two or more"
        )
    if not counts:
        raise DataError(f"column {quote(column)} has no labels at all: classifying needs them")
    if len(counts) > MOST_CLASSES or (len(counts) > 100 and 2 * len(counts) > rows):
        raise DataError(
            f"column {quote(column)} has {len(counts)} different labels in {rows} rows: "
            "is it a column of texts or numbers? name the right one in data.label"
        )


# --- several questions ------------------------------------------------------------------------------------------------


def question_in(label: str) -> str:
    """The column in `column: class`; "" if there is none."""
    return label.partition(BETWEEN)[0] if BETWEEN in label else ""


def by_column(counts: Mapping[str, int], columns: Iterable[str]) -> dict[str, Counter[str]]:
    """The counts of the classes `column: class` by column, there by class alone."""
    found = {column: Counter[str]() for column in columns}
    for label, count in counts.items():
        found[question_in(label)][label.partition(BETWEEN)[2]] += count
    return found


# --- spans ------------------------------------------------------------------------------------------------------------


_TAG = re.compile(r"([BIESLUM])[-_](.+)", re.DOTALL)
_NO_TAG = frozenset(("O", "o", "_", ""))
_KEYS = (("start", "start_offset"), ("end", "end_offset"), ("label", "type", "entity", "tag", "entity_group"))


def _tag(cell: CellValue, names: Sequence[str]) -> str:
    """The tag in a cell, or the name of its number. Raises DataError."""
    if isinstance(cell, str):
        return trim_text(cell)
    if isinstance(cell, int) and not isinstance(cell, bool) and 0 <= cell < len(names):
        return names[cell]
    if isinstance(cell, (int, float)) and not names:
        raise DataError(f"the tag {quote(cell, 20)} is a number that the table does not name: write tags such as B-PER")
    raise DataError(f"expected a tag such as B-PER, found {quote(cell, 40)}")


def spans_of_tags(words: Sequence[str], tags: Sequence[str]) -> tuple[str, list[Span]]:
    """The text of words, with blanks between them, and its spans.

    B begins a span, I and E continue one of the same label, E ends it, and S is one word: IOB, IOB2 and BIOES, also
    with L and U. A tag without such a letter continues a span of its label.
    """
    text, spans, open_label = "", list[Span](), ""
    for word, tag in zip(words, tags, strict=True):
        if not word:
            continue
        text += f" {word}" if text else word
        parts = _TAG.fullmatch(tag)
        letter, label = (parts[1], parts[2]) if parts else ("I", "" if tag in _NO_TAG else tag)
        if label:
            _checked_label(label)
            start = len(text) - len(word)
            if letter in "IELM" and label == open_label:
                spans[-1] = (spans[-1][0], len(text), label)
            else:
                spans.append((start, len(text), label))
        open_label = "" if letter in "ESLU" else label
    return text, spans


def spans_in(items: Sequence[CellValue], text: str) -> list[Span]:
    """The spans of a list, in order: `{start, end, label}`, or start, end and label. Raises DataError.

    Blanks at their ends do not belong to them.
    """
    spans = []
    for item in items:
        if isinstance(item, Mapping):
            parts = [next((item[key] for key in keys if key in item), None) for keys in _KEYS]
        else:
            parts = list(item) if isinstance(item, (list, tuple)) else []
        if len(parts) < 3 or not all(isinstance(each, int) and not isinstance(each, bool) for each in parts[:2]):
            raise DataError(f"expected a span with start, end and label, found {quote(item, 60)}")
        start, end, label = int(str(parts[0])), int(str(parts[1])), _one_label(parts[2], ())
        if not 0 <= start < end <= len(text) or not label:
            raise DataError(
                f"the span {quote(item, 60)} has no label, or is outside its text of {len(text)} characters"
            )
        inside = text[start:end]
        start, end = start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())
        if start < end:
            spans.append((start, end, label))
    spans.sort()
    for before, after in itertools.pairwise(spans):
        if after[0] < before[1]:
            both = f"{before[0]}-{before[1]} {before[2]} and {after[0]}-{after[1]} {after[2]}"
            raise DataError(f"the spans {both} overlap, and a character has one label: leave one of them out")
    return spans


# --- the cells of a row -----------------------------------------------------------------------------------------------


@dataclass
class RowReader:
    """Reads one row after another, a cell by the role of its column. What is missing raises Missing.

    Args:
        roles: of the columns, in the order of a row's cells.
        names: the names of class numbers, if the table has them.
        separator: between the labels of a cell.
        rename: label -> the class that is meant; "": rows with it are left out.
        replaced: counts replaced characters.
        renamed: counts the labels that `rename` changes.
        changes: counts the conversations that lose turns.
    """

    roles: Sequence[str]
    names: Sequence[str] = ()
    separator: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    replaced: Counter[str] = field(default_factory=Counter)
    renamed: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    role: str = ""  # that is being read
    _cells: Mapping[str, CellValue] = field(default_factory=dict)

    def begin(self, cells: Sequence[CellValue]) -> None:
        """Go on to a row; cells behind those of the roles are ignored."""
        self._cells = dict(zip(self.roles, cells, strict=False))

    def has(self, role: str) -> bool:
        """Whether there is a column of that role."""
        return role in self._cells

    def cell(self, role: str) -> CellValue:
        """A cell as it is; None without its column."""
        self.role = role if role in self._cells else self.role
        return self._cells.get(role)

    def text(self, role: str) -> str:
        """A text; for `tokens` the words with blanks between them."""
        return self.require_value((words_of if role == "tokens" else text_of)(self.cell(role), self.replaced))

    def texts(self, role: str) -> str | tuple[str, ...]:
        """A text, or the texts of a list."""
        found = texts_in(self.cell(role), self.replaced)
        if found is None:
            raise Missing
        return found

    def number(self, role: str) -> float:
        return self.require_value(number_of(self.cell(role)))

    def label(self, role: str, *, many: bool = False) -> Label:
        """A class, or with `many` a sorted tuple of classes."""
        cell = self.cell(role)
        found = label_of(split_labels(cell, self.separator) if many else cell, self.names, many)
        if self.rename and found is not None:
            labels = (found,) if isinstance(found, str) else found
            self.renamed.update(label for label in labels if label in self.rename)
            found = rename_label(found, self.rename)
        if found is None:
            raise Missing
        return found

    def answers(self, role: str) -> tuple[str, ...]:
        """The classes that several columns have, sorted, each as `column: class`. A column may have none."""
        cell = self.cell(role)
        if not isinstance(cell, Answers):
            raise DataError(f"expected the answers of several columns, found {quote(cell, 40)}")
        found = {column: self._answer(column, each) for column, each in cell.items()}
        if not any(found.values()):
            raise Missing
        self.replaced.update(f"had no {column!r}, which is not counted" for column in found if not found[column])
        return tuple(sorted(filter(None, found.values())))

    def _answer(self, column: str, cell: CellValue) -> str:
        """`column: class`; "" if the cell is missing, or `rename` leaves its class out."""
        try:
            label = label_of(cell, (), multi_label=False)
        except DataError as error:
            raise DataError(f"{column}: {error}") from None
        if label is None:
            return ""
        given = _checked_label(answer_to(column, str(label)))
        meant = self.rename.get(given, given)
        self.renamed.update([given] if given in self.rename else [])
        if meant and question_in(meant) != column:
            raise DataError(
                f"data.rename makes {quote(meant, 40)} of {quote(given, 40)}: keep {column + ': '!r} in front"
            )
        return meant

    def asked_text(self) -> str | TextPair:
        """The text to read, or two if there is a column of second texts."""
        text = self.text("text")
        return TextPair(text, self.text("text_pair")) if self.has("text_pair") else text

    def tagged_text(self) -> tuple[str, tuple[Span, ...]]:
        """A text and its spans: from words with a tag each, or from a text with a list of spans."""
        if self.has("tokens"):
            words = _words(self.cell("tokens"), self.replaced)
            if not any(words):
                raise Missing
            tags = self.require_value(_cell_items(self.cell("tags")))
            if len(tags) != len(words):
                raise DataError(f"{len(tags)} tags for {len(words)} words: give a tag for each word")
            text, spans = spans_of_tags(words, [_tag(each, self.names) for each in tags])
        else:
            text = self.text("text")
            spans = spans_in(self.require_value(_cell_items(self.cell("spans"))), text)
        kept = [(start, end, self.rename.get(label, label)) for start, end, label in spans]
        self.renamed.update({label for _, _, label in spans if label in self.rename})
        return text, tuple(span for span in kept if span[2])

    def require_value(self, value: T | None) -> T:
        """The value. Raises Missing if it is None."""
        if value is None:
            raise Missing
        return value
