"""Knows the tables of tasks that this version does not have, so that they are refused by the name of their task."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from turret.data.column_names import name_key
from turret.errors import DataError, listed


@dataclass(frozen=True)
class _Shape:
    """Column names that show the task of a table."""

    task: str  # as a recipe of a later version names it
    about: str
    all_of: tuple[str, ...]  # each of these columns is there
    one_of: tuple[str, ...] = ()  # and one of these
    instead: str = ""  # what this version can do with the table


_SHAPES = (
    _Shape("preference", "answers preferred to others", ("chosen", "rejected"),
           instead="to learn the preferred answers, name --prompt prompt --completion chosen"),
    _Shape("token_classification", "a tag for each word", ("tokens",), ("tags", "ner_tags", "pos_tags", "labels")),
    _Shape("question_answering", "answers inside a context", ("question", "context"), ("answers", "answer")),
    _Shape("regression", "a number for two texts", ("sentence1", "sentence2"), ("score", "similarity")),
    _Shape("text_pairs", "a label for two texts", ("premise", "hypothesis"), ("label", "labels", "gold_label"),
           "to classify one of them, name --text hypothesis --label {label}"),
    _Shape("text_pairs", "a label for two texts", ("sentence1", "sentence2"), ("label", "labels", "gold_label"),
           "to classify one of them, name --text sentence1 --label {label}"),
    _Shape("text_pairs", "a label for two texts", ("question1", "question2"), ("label", "is_duplicate"),
           "to classify one of them, name --text question1 --label {label}"),
    _Shape("embedding", "similar and other texts", ("anchor", "positive")),
    _Shape("embedding", "similar and other texts", ("query", "positive")),
)  # fmt: skip


def task_of(columns: Sequence[str], known: Collection[str] = ()) -> str | None:
    """The later task that a table with these columns belongs to."""
    found = _shape_of(columns, known)
    return None if found is None else found.task


def refuse(columns: Sequence[str], known: Collection[str] = ()) -> None:
    """Raise DataError if the columns are those of a task that this version does not have.

    Args:
        columns: of the table.
        known: kinds of the tasks of this version.
    """
    shape = _shape_of(columns, known)
    if shape is None:
        return
    used = [name for name in columns if name_key(name) in (*shape.all_of, *shape.one_of)]
    label = next((name for name in used if name_key(name) in shape.one_of), "")
    instead = shape.instead.format(label=label)
    raise DataError(
        f"the columns {listed(used, 80)} belong to the task {shape.task} ({shape.about}), which a later version will "
        f"have: {instead or 'give another table, or name columns of a task of this version'}"
    )


def _shape_of(columns: Sequence[str], known: Collection[str]) -> _Shape | None:
    names = {name_key(name) for name in columns}
    for shape in _SHAPES:
        there = names.issuperset(shape.all_of) and (not shape.one_of or names & set(shape.one_of))
        if there and shape.task not in known:
            return shape
    return None
