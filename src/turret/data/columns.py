"""Finds the input and output columns of a table: those that the recipe names, else those with an obvious name.

A task's `Schema` lists the obvious names. A note reports each guess.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turret.data.cells import Label, Replacements
from turret.data.examples import Example
from turret.data.files import CellValue
from turret.data.settings import DataSettings
from turret.errors import DataError, listed, shown

Roles = tuple[str, str]  # the keys of a recipe's [data] for the input and the output
LABELLED: Roles = ("text", "label")
SUMMARISED: Roles = ("document", "summary")
COMPLETED: Roles = ("prompt", "completion")
ROLES = (LABELLED, SUMMARISED, COMPLETED)


@dataclass(frozen=True)
class Schema:
    """The columns that one task reads from a table, and the examples that it makes.

    Args:
        kind: of the task.
        names: by pair of roles, the usual pair first, pairs of column names that are obvious for it.
        inputs: column names that are obvious if only inputs are read.
        output: (cell, names of class numbers, counter of replaced characters) -> label or text; None: missing.
        example: (text, output) -> the example.
        classes: whether outputs are classes, which are counted, checked and listed.
        many: whether an example has any number of classes.
    """

    kind: str
    names: Mapping[Roles, Sequence[tuple[str, str]]]
    inputs: Sequence[str]
    output: Callable[[CellValue, Sequence[str], Replacements], Label | None]
    example: Callable[[str, Any], Example]  # Any: the result of `output`, a text for one task and labels for another
    classes: bool = False
    many: bool = False

    @property
    def usual(self) -> Roles:
        """The roles of its columns if a recipe names none."""
        return next(iter(self.names))


@dataclass(frozen=True)
class Columns:
    """The input and output columns of a table, by their roles."""

    schema: Schema
    roles: dict[str, str]  # ("text", "label"), ("document", "summary") or ("prompt", "completion") -> column
    note: str | None  # what was guessed

    @property
    def pair(self) -> tuple[str, str]:
        """The names of the input and the output column."""
        first, second = self.roles.values()
        return first, second


def find_columns(data: DataSettings, columns: Sequence[str], schemas: Sequence[Schema]) -> Columns:
    """The columns that the recipe names, else those among `columns` with an obvious name. Raises DataError.

    Args:
        data: a recipe's `[data]`.
        columns: of the table.
        schemas: of the recipe's task; of all tasks if the columns have to decide which it is.
    """
    given = _given(data)
    only = schemas[0] if len(schemas) == 1 else None
    pairs = _named_pairs(given, only)
    for name in given.values():
        _check_there(name, columns)
    found = []
    for schema in schemas:
        for pair in schema.names if only else (schema.usual,):  # other pairs do not help to choose a task
            if (not pairs or pair in pairs) and (guess := _guess(schema, pair, given, columns)):
                found.append(Columns(schema, dict(zip(pair, guess, strict=True)), None))
                break
    if not found:
        raise DataError(_not_found(given, columns, only))
    if len(found) > 1 and not given:
        both = " and ".join(f"{f.schema.kind} ({listed(f.pair, 60)})" for f in found[:2])
        raise DataError(
            f"the columns {listed(columns, 80)} fit {both}: set task.kind, or name the columns under [data]"
        )
    best = found[0]
    if all(role in given for role in best.roles):
        return best
    guessed = ", ".join(f"{role} is column {name!r}" for role, name in best.roles.items() if role not in given)
    others = [name for name in columns if name not in best.pair]
    note = f"guessed: {best.schema.kind}, {guessed}" + (f"; not used: {', '.join(others)}" if others else "")
    return Columns(best.schema, best.roles, note)


def find_input(data: DataSettings, columns: Sequence[str], schema: Schema) -> str:
    """The column of inputs in a table that may have no outputs. Raises DataError."""
    role, given = schema.usual[0], _given(data)
    named = next((name for first, _ in schema.names if (name := given.get(first))), None)
    if named is not None:
        _check_there(named, columns)
        return named
    low = {name.strip().lower(): name for name in reversed(columns)}
    found = [low[name] for name in dict.fromkeys((role, *schema.inputs)) if name in low]
    if found or len(columns) == 1:
        return found[0] if found else columns[0]
    raise DataError(
        f"cannot tell which column has the inputs; the columns are {listed(columns)}: name one with --column"
    )


def _given(data: DataSettings) -> dict[str, str]:
    """The columns that the recipe names, by role."""
    return {role: name for pair in ROLES for role in pair if (name := getattr(data, role)) is not None}


def _named_pairs(given: dict[str, str], only: Schema | None) -> list[Roles]:
    """The pairs of roles of the columns that the recipe names."""
    pairs = [pair for pair in ROLES if given.keys() & set(pair)]
    if len(pairs) > 1:
        raise DataError(f"data names {' and '.join(given)}, which belong to different tasks: name one pair of columns")
    if pairs and only and pairs[0] not in only.names:
        raise DataError(f"data.{next(iter(given))} does not belong to {only.kind}: name {' and '.join(only.usual)}")
    return pairs


def _guess(schema: Schema, roles: Roles, given: dict[str, str], columns: Sequence[str]) -> tuple[str, str] | None:
    low = {name.strip().lower(): name for name in reversed(columns)}
    first, second = given.get(roles[0]), given.get(roles[1])
    if first and second:
        return first, second
    for a, b in schema.names[roles]:
        pair = first or low.get(a), second or low.get(b)
        if pair[0] and pair[1] and pair[0] != pair[1]:
            return pair[0], pair[1]
    return None


def _check_there(name: str, columns: Sequence[str]) -> None:
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        meant = f", did you mean {shown(near[0])}?" if near else ""
        raise DataError(f"there is no column {shown(name)}: the columns are {listed(columns)}{meant}")


def _not_found(given: dict[str, str], columns: Sequence[str], only: Schema | None) -> str:
    named = f" beside {listed(given.values(), 60)}" if given else ""
    if (only and LABELLED in only.names) or set(LABELLED) & given.keys():
        remedy = "set data.text and data.label, for example --set data.text=COLUMN --set data.label=COLUMN"
    elif only:
        remedy = "set data.document and data.summary (or data.prompt and data.completion) to column names"
    else:
        remedy = "set data.text and data.label, or data.document and data.summary, to column names"
    return f"cannot tell which columns to use{named}; the columns are {listed(columns)}: {remedy}"
