"""Read the data of a training or of a stored version. Loads no torch, so a mistake in a table is reported quickly."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from turret.data import Dataset, Example, Input, Labelled, Prompt, Schema, TextPair, memory
from turret.data.columns import LABELLED, RoleColumns
from turret.data.table import BETWEEN, ROLES, answer_to, find_column, list_columns, require_columns
from turret.errors import AdapterError, DataError, RecipeError, TurretError, count_of, one_line, quote, quote_all
from turret.json_types import JsonValue, Plain
from turret.recipe import AUTO, Data, Recipe, default_base, read_toml
from turret.store import Panel, Question, Store, Version
from turret.store.panels import decisions_of
from turret.tasks import schemas, stored_task, task_of
from turret.tasks.classify import TEXTS
from turret.trackers import require_installed
from turret.workspace.progress import Say, silent

if TYPE_CHECKING:
    from turret.data.dataset import Rows

KEPT = (
    "separator",
    "normalize_labels",
    "header",
    "rename",
    "bad_lines",
)  # other keys that a version reads new tables with
MOST_BYTES = 64 << 20  # of training data that an evaluation reads, to say what of it the examples are
PANEL = Schema(  # a text, and an answer in each of several columns
    "panel",
    {LABELLED: [(text, "label") for text in TEXTS]},
    TEXTS,
    lambda row: Labelled(row.asked_text(), row.answers("label")),
    classes=True,
    many=True,
    several=True,
)
Texts: TypeAlias = Input | Iterable[Input]  # also a Series of pandas, an array of numpy, a column of `datasets`
Source: TypeAlias = str | Path | memory.RowsInMemory  # of data: what `data.source` of a recipe takes


def inputs_in(texts: Texts) -> list[Input]:
    """The inputs in one text, pair or conversation, or in a list, a Series, an array or a column of them.

    A pair of texts is a `TextPair`, a tuple of two texts, or `{"text": …, "text_pair": …}`.

    Raises:
        DataError: there are none, or one of them is no text.
    """
    if isinstance(texts, (str, TextPair, Prompt)):
        return [texts]
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):
        raise DataError(
            f'a {type(texts).__name__} has several columns: give the one with the texts, such as data["text"]'
        )
    listed = texts.tolist() if hasattr(texts, "tolist") else texts  # a Series of pandas, an array of numpy
    if isinstance(listed, (bytes, Mapping)) or not isinstance(listed, Iterable):
        raise DataError(f"expected a text, or a list or a Series of texts, given a {type(texts).__name__}")
    found = [listed] if isinstance(listed, str) else list(listed)
    found = [_as_text_pair(each) for each in found]
    for place, each in enumerate(found, 1):
        if not isinstance(each, (str, TextPair, Prompt)):
            raise DataError(
                f"text {place} of {len(found)}: expected a text, given {quote(each)}: drop it, or make it a text"
            )
    if not found:
        raise DataError("nothing to answer: give a text, or a file with at least one line")
    return [str(each) if isinstance(each, str) else each for each in found]


def _as_text_pair(value: Input | Plain) -> Input | JsonValue:
    """A tuple of two texts, or an object with the keys of a pair, as a `TextPair`; anything else as it is."""
    if isinstance(value, Mapping) and value.keys() == {"text", "text_pair"}:
        value = (value["text"], value["text_pair"])
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(each, str) for each in value):
        return TextPair(*value)
    return value


def source_of(data: Source) -> str:
    """The source of some data as a recipe names it. Raises DataError for rows in memory that cannot be used."""
    return memory.write_rows(data) if memory.is_rows(data) else str(data)


@dataclass(frozen=True)
class LabelledData:
    """The examples that a version is measured on."""

    data: Data
    examples: Sequence[Example]
    places: Sequence[int]  # the line (of a text file) or the number of each one's row
    notes: Sequence[str]


def read_dataset(store: Store, recipe: Recipe, say: Say = silent) -> Dataset:
    """The data set of a recipe. Raises DataError.

    Args:
        store: where rows are that another process had in memory.
    """
    from turret.data import dataset

    say(f"reading {one_line(recipe.data.source, 100)}")
    store.bring_rows(recipe.data.source)
    return dataset.read_dataset(recipe.data, schemas(recipe.task), recipe.split_seed)


def training_inputs(store: Store, version: Version, say: Say = silent) -> frozenset[str] | None:
    """What the training of a version was asked about, with its validation split; None if that data is not here.

    Data that is not the version's any more is not here either.
    """
    recipe = version.lineage.get("recipe")
    try:
        dataset = read_dataset(store, Recipe.from_toml(str(recipe)), say) if recipe else None
    except TurretError:
        return None
    if dataset is None or dataset.digest != version.lineage.get("data"):
        return None
    return asked_in((*dataset.train, *dataset.validation))


def asked_in(examples: Iterable[Example]) -> frozenset[str]:
    """What the examples ask, as they are compared with others."""
    return frozenset(str(each.asked) for each in examples)


def trained_on_note(store: Store, version: Version, examples: Sequence[Example]) -> list[str]:
    """A note if training used some of the examples. Training data is read if it is a small file or folder here."""
    source = Path(str(trained_on(version).get("source") or "none"))
    try:
        files = [source] if source.is_file() else [each for each in source.glob("*") if each.is_file()]
        size = sum(each.stat().st_size for each in files)
    except (OSError, ValueError):  # somebody else's folder, or no path
        return []
    if not 0 < size <= MOST_BYTES:
        return []
    used = training_inputs(store, version) or frozenset()
    seen = sum(str(each.asked) in used for each in examples)
    if not seen:
        return []
    what = f"{seen} of {count_of(len(examples), 'example')}"
    return [f"{version} was trained on {what}, so its scores are too high: measure on examples that training left out"]


def read_before_torch(store: Store, recipe: Recipe, say: Say) -> Dataset | None:
    """The data set, unless torchrun started several processes, of which the main one has to read first."""
    require_installed(recipe.train.trackers or ())
    return None if os.environ.get("WORLD_SIZE", "1") != "1" else read_dataset(store, recipe, say)


def with_base(recipe: Recipe, kind: str) -> tuple[Recipe, list[str]]:
    """The recipe with a base, and a note if it named none.

    Args:
        kind: of the task.

    Raises:
        RecipeError: the task does not read one of the settings.
    """
    recipe.require_read(kind)
    if recipe.base != AUTO:
        return recipe, []
    base, note = default_base(task_of(kind).head)
    return recipe.model_copy(update={"base": base}), [note]


def read_labelled(store: Store, version: Version, source: str, columns: RoleColumns) -> LabelledData:
    """The test examples of a source as a version reads them: with the columns and labels of its training data.

    Args:
        columns: keys of a recipe's `[data]`, which override the version's.
    """
    from turret.data.dataset import read_test

    spec = version.task
    schema = stored_task(spec).schema(multi_label=bool(spec.get("multi_label")))
    trained = trained_on(version)
    if isinstance(several := trained.get("label"), list):
        columns = {"label": several, **columns}
    data = _data(store, source, trained, columns)
    rows = read_test(data, schema, labels=tuple(spec.get("labels") or ()), trained=_roles(trained))
    return LabelledData(data, rows.examples, rows.places, rows.notes)


@dataclass(frozen=True)
class PanelQuestion:
    """A question of a panel with what a table says about it.

    Args:
        version: that answers it now.
        column: of the table.
        right: the right label of each text; None where the table has none.
    """

    question: Question
    version: Version
    column: str
    right: Sequence[str | None]


@dataclass(frozen=True)
class PanelData:
    """The texts that a panel is measured on, with the right answers.

    Args:
        left_out: questions without a column.
    """

    data: Data
    texts: Sequence[str]
    places: Sequence[int]  # the line (of a text file) or the number of each one's row
    questions: Sequence[PanelQuestion]
    left_out: Sequence[str]
    notes: Sequence[str]


def read_panel(store: Store, panel: Panel, source: str, columns: RoleColumns) -> PanelData:
    """The test examples of a source, with the right answers to a panel's questions.

    Args:
        columns: keys of a recipe's `[data]`. `label` has the columns of questions that are called otherwise.

    Raises:
        NotFound: a reference of the panel names no version.
        AdapterError: a version does not answer its question any more.
        DataError: no question has a column, or a cell is no label of its question.
    """
    from turret.data.dataset import read_test, test_columns

    if foreign := next((role for role in ROLES if role in columns and role not in LABELLED), None):
        raise DataError(f"data.{foreign} does not belong to a panel: name text, and label for its questions")
    data = _data(store, source, {}, {key: value for key, value in columns.items() if key != "label"})
    there = test_columns(data)
    column_of = _columns_of_questions(panel, columns.get("label"), there, source)
    versions = {each: _answering(store, panel.question(each)) for each in column_of}
    data = data.model_copy(update={"label": list(dict.fromkeys(column_of.values()))})
    meant = {each: _labels_by_cell(panel.question(each)) for each in column_of}
    known = [answer_to(column, cell) for each, column in column_of.items() for cell in meant[each]]
    texts = (_roles(trained_on(each)).get("text") for each in versions.values())
    text = next((each for each in texts if each is not None and find_column(each, there) is not None), None)
    rows = read_test(data, PANEL, labels=tuple(dict.fromkeys(known)), trained=None if text is None else {"text": text})
    given = [dict(label.split(BETWEEN, 1) for label in each.labels) for each in rows.examples]
    questions = [
        PanelQuestion(
            panel.question(each), versions[each], column, [_right(each, row.get(column), meant[each]) for row in given]
        )
        for each, column in column_of.items()
    ]
    left_out = [each.name for each in panel.questions if each.name not in column_of]
    notes = list(rows.notes)
    if left_out:
        notes.append(f"no column for {quote_all(left_out, 120)}, left out: --label QUESTION=COLUMN names one")
    return PanelData(data, [str(each.asked) for each in rows.examples], rows.places, questions, left_out, notes)


def _columns_of_questions(panel: Panel, named: Plain, there: Sequence[str], source: str) -> dict[str, str]:
    """The columns of questions: those that are named, else those with the name of a question."""
    if isinstance(named, str) and len(panel.questions) == 1:
        named = {panel.questions[0].name: named}
    if not isinstance(named, Mapping | None):
        raise DataError(
            f"label {quote(named, 60)}: panel {panel} has {len(panel.questions)} questions, expected their "
            "columns by name: --label QUESTION=COLUMN"
        )
    given = {panel.question(name).name: str(column) for name, column in (named or {}).items()}
    given = require_columns(given, there)
    found = {each.name: given.get(each.name) or find_column(each.name, there) for each in panel.questions}
    columns = {name: column for name, column in found.items() if column is not None}
    if wrong := next((column for column in columns.values() if BETWEEN in column), None):
        raise DataError(f"column {quote(wrong, 40)}: rename it without {BETWEEN!r}")
    if not columns:
        names = quote_all([each.name for each in panel.questions], 80)
        raise DataError(
            f"{one_line(source, 60)} has no column for a question of {panel} ({names}): its columns are "
            f"{list_columns(there, 80)}; name one with --label QUESTION=COLUMN"
        )
    return columns


def _answering(store: Store, question: Question) -> Version:
    """The version that answers a question now. Raises AdapterError if it has other labels than the question."""
    version = store.resolve(question.adapter)
    decision = decisions_of(version).get(question.part)
    if decision is None or set(decision.labels) != set(question.labels):
        has = "does not answer it any more" if decision is None else f"has the labels {quote_all(decision.labels, 80)}"
        raise AdapterError(
            f"question {quote(question.name, 40)} has the labels {quote_all(question.labels, 80)}, and {version} "
            f"{has}: make a new version of the panel"
        )
    return version


def _labels_by_cell(question: Question) -> dict[str, str]:
    """What a cell may hold, and the label that it means: a label, and for a predicate true and false."""
    sides = dict(zip(("false", "true"), question.labels, strict=True)) if question.type == "predicate" else {}
    return sides | {label: label for label in question.labels}


def _right(question: str, cell: str | None, meant: Mapping[str, str]) -> str | None:
    if cell is not None and cell not in meant:
        raise DataError(
            f"question {quote(question, 40)} has no label {quote(cell, 40)}: it has {quote_all(meant, 120)}"
        )
    return None if cell is None else meant[cell]


def read_texts(store: Store, version: Version, source: str, columns: RoleColumns) -> list[Input]:
    """The inputs in a file: the lines of a .txt file, or a column of a table."""
    from turret.data.dataset import read_inputs

    trained = trained_on(version)
    schema = stored_task(version.task).schema()
    return read_inputs(_data(store, source, trained, columns), schema, trained=_roles(trained))


def read_rows(store: Store, version: Version, source: str, columns: RoleColumns) -> Rows:
    """The rows of a file with all their cells, to be answered one after another."""
    from turret.data import dataset

    trained = trained_on(version)
    schema = stored_task(version.task).schema()
    return dataset.read_rows(_data(store, source, trained, columns), schema, trained=_roles(trained))


def trained_on(version: Version) -> Mapping[str, Plain]:
    """The `[data]` of the recipe that made a version; empty for a version without a recipe, such as an imported one."""

    try:
        recipe = read_toml(str(version.lineage.get("recipe") or ""))
    except ValueError:
        return {}
    data = recipe.get("data")
    return data if isinstance(data, dict) else {}


def _roles(trained: Mapping[str, Plain]) -> dict[str, str]:
    return {role: column for role in ROLES if isinstance(column := trained.get(role), str)}


def _data(store: Store, source: str, trained: Mapping[str, Plain], columns: RoleColumns) -> Data:

    kept = {key: trained[key] for key in KEPT if key in trained}
    try:
        data = Data.model_validate({"source": source, **kept, **columns})
    except RecipeError as error:
        raise RecipeError(f"the columns of {source[:60]!r}: {error}") from None
    store.bring_rows(data.source)
    return data
