"""Which column is the input and which the output. Guesses only what is obvious, and says what it guessed.

Names alone decide; a task's `Schema` says which names are obvious.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turret.data.cells import Label, Mended
from turret.data.examples import Example
from turret.errors import DataError, listed, shown

Roles = tuple[str, str]  # the keys of a recipe's [data] for the input and the output
LABELLED: Roles = ("text", "label")
SUMMARISED: Roles = ("document", "summary")
COMPLETED: Roles = ("prompt", "completion")
ROLES = (LABELLED, SUMMARISED, COMPLETED)


@dataclass(frozen=True)
class Schema:
    """What one task reads of a table.

    Args:
        kind: the task's.
        names: by pair of roles, the usual pair first, the column names that are obvious for it.
        inputs: column names that are obvious where only inputs are read.
        output: (cell, names of class numbers, counts of mended texts) -> what is learnt; None where it is missing.
        example: (text, output) -> the example.
        classes: whether outputs are classes, which are counted, checked and listed.
        many: whether an example has any number of classes.
    """

    kind: str
    names: Mapping[Roles, Sequence[tuple[str, str]]]
    inputs: Sequence[str]
    output: Callable[[Any, Sequence[str], Mended], Label | None]
    example: Callable[[str, Any], Example]
    classes: bool = False
    many: bool = False

    @property
    def usual(self) -> Roles:
        """The roles that its columns have where a recipe names none."""
        return next(iter(self.names))


@dataclass(frozen=True)
class Columns:
    """The two columns that matter, under the names that a recipe gives them."""

    schema: Schema
    roles: dict[str, str]  # ("text", "label"), ("document", "summary") or ("prompt", "completion") -> column
    note: str | None  # the guess, where there was one

    @property
    def wanted(self) -> tuple[str, str]:
        first, second = self.roles.values()
        return first, second


def find_columns(data: Any, columns: Sequence[str], schemas: Sequence[Schema]) -> Columns:
    """The columns that the recipe names, else the obvious ones among `columns`.

    Args:
        data: a recipe's `[data]`.
        columns: of the table.
        schemas: of the task, or of all tasks where the columns have to tell which.
    """
    given = {role: name for pair in ROLES for role in pair if (name := getattr(data, role, None)) is not None}
    only = schemas[0] if len(schemas) == 1 else None
    pairs = _named_pairs(given, only)
    for name in given.values():
        _check_there(name, columns)
    found = []
    for schema in schemas:
        for pair in schema.names if only else (schema.usual,):  # the other pair's names are welcome, not a sign
            if (not pairs or pair in pairs) and (guess := _guess(schema, pair, given, columns)):
                found.append(Columns(schema, dict(zip(pair, guess, strict=True)), None))
                break
    if not found:
        raise DataError(_not_found(given, columns, only))
    if len(found) > 1 and not given:
        both = " and ".join(f"{f.schema.kind} ({listed(f.wanted, 60)})" for f in found[:2])
        raise DataError(
            f"the columns {listed(columns, 80)} fit {both}: say task.kind, or name the columns under [data]"
        )
    best = found[0]
    if all(role in given for role in best.roles):
        return best
    said = ", ".join(f"{role} is column {name!r}" for role, name in best.roles.items() if role not in given)
    others = [name for name in columns if name not in best.wanted]
    note = f"guessed: {best.schema.kind}, {said}" + (f"; not used: {', '.join(others)}" if others else "")
    return Columns(best.schema, best.roles, note)


def find_input(data: Any, columns: Sequence[str], schema: Schema) -> str:
    """The column of inputs in a table that need not have outputs."""
    role = schema.usual[0]
    named = next((name for first, _ in schema.names if (name := getattr(data, first, None))), None)
    if named is not None:
        _check_there(named, columns)
        return str(named)
    low = {name.strip().lower(): name for name in reversed(columns)}
    found = [low[name] for name in dict.fromkeys((role, *schema.inputs)) if name in low]
    if found or len(columns) == 1:
        return found[0] if found else columns[0]
    raise DataError(
        f"cannot tell which column has the inputs; the columns are {listed(columns)}: name one with --column"
    )


def _named_pairs(given: dict[str, str], only: Schema | None) -> list[Roles]:
    """The pairs of roles that the recipe's own names belong to."""
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
