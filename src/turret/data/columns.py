"""Finds the input and output columns of a table: those that the recipe names, else those with an obvious name.

A task's `Schema` lists the obvious names; `layouts` finds those of conversations. A note reports each guess. Names are
compared without case and outer blanks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from turret.data import later_tasks
from turret.data.cells import Label, Replacements
from turret.data.column_names import PAIR_ROLES, find_column, found_columns, name_key, named_columns, trained_columns
from turret.data.examples import Example
from turret.data.layouts import Layout, kept_columns, layout_note, named_layout, require_no_layout
from turret.data.settings import DataSettings
from turret.data.table import CellValue, Table
from turret.errors import DataError, listed

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
        conversations: whether the examples are conversations, whose columns `layouts` finds.
    """

    kind: str
    names: Mapping[Roles, Sequence[tuple[str, str]]]
    inputs: Sequence[str]
    output: Callable[[CellValue, Sequence[str], Replacements], Label | None]
    example: Callable[[str, Any], Example]  # Any: the result of `output`, a text for one task and labels for another
    classes: bool = False
    many: bool = False
    conversations: bool = False

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
    layout: Layout | None = None  # of conversations, with the same roles

    @property
    def pair(self) -> tuple[str, str]:
        """The names of the input and the output column."""
        first, second = self.roles.values()
        return first, second


def find_columns(
    data: DataSettings,
    columns: Sequence[str],
    schemas: Sequence[Schema],
    *,
    trained: Mapping[str, str] | None = None,
) -> Columns:
    """The columns that the recipe names, else those among `columns` with an obvious name. Raises DataError.

    Args:
        data: a recipe's `[data]`.
        columns: of the table.
        schemas: of the recipe's task; of all tasks if the columns have to decide which it is.
        trained: role -> column of the table that a version was trained on, for what the recipe does not name. The table
            may lack it.
    """
    columns = kept_columns(data, columns)
    if (conversations := _conversations(data, columns, schemas, trained)) is not None:
        return conversations
    schemas = [schema for schema in schemas if not schema.conversations]
    given = found_columns(named_columns(data, PAIR_ROLES), columns)
    note = None
    if trained:
        known, lacks = trained_columns(trained, columns)
        if not given:
            given, note = known, lacks
        else:  # one column is named: the version knows the other
            pair_of: Sequence[str] = next((pair for pair in schemas[0].names if given.keys() & set(pair)), ())
            given |= {role: name for role, name in known.items() if role in pair_of and role not in given}
    only = schemas[0] if len(schemas) == 1 else None
    pairs = _named_pairs(given, only)
    found = []
    for schema in schemas:
        for pair in schema.names if only else (schema.usual,):  # other pairs do not help to choose a task
            if (not pairs or pair in pairs) and (guess := _guess(schema, pair, given, columns)):
                found.append(Columns(schema, dict(zip(pair, guess, strict=True)), note))
                break
    if not found:
        if not given:
            later_tasks.refuse(columns, [schema.kind for schema in schemas])
        raise DataError(_not_found(given, columns, only))
    if len(found) > 1 and not given:
        both = " and ".join(f"{f.schema.kind} ({listed(f.pair, 60)})" for f in found[:2])
        raise DataError(
            f"the columns {listed(columns, 80)} fit {both}: set task.kind (--task), or name the columns under [data]"
        )
    best = found[0]
    if all(role in given for role in best.roles):
        return best
    guessed = ", ".join(f"{role} is column {name!r}" for role, name in best.roles.items() if role not in given)
    others = [name for name in columns if name not in best.pair]
    guess_note = f"guessed: {best.schema.kind}, {guessed}" + (f"; not used: {', '.join(others)}" if others else "")
    return Columns(best.schema, best.roles, f"{note}; {guess_note}" if note else guess_note)


def _conversations(
    data: DataSettings, columns: Sequence[str], schemas: Sequence[Schema], trained: Mapping[str, str] | None
) -> Columns | None:
    schema, known = next((schema for schema in schemas if schema.conversations), None), len(schemas) == 1
    if schema is None:
        if known:
            require_no_layout(data, schemas[0].kind)
        return None
    layout = named_layout(data, columns, schema.kind, known=known, trained=trained)
    if layout is None:
        return None
    return Columns(schema, layout.roles, layout_note(data, schema.kind, layout, columns, trained), layout)


def find_input(
    data: DataSettings, columns: Sequence[str], schema: Schema, *, trained: Mapping[str, str] | None = None
) -> str:
    """The column of inputs in a table that may have no outputs. Raises DataError.

    Args:
        trained: role -> column of the table that a version was trained on; used if the table has it.
    """
    columns = kept_columns(data, columns)
    role, given = schema.usual[0], named_columns(data, PAIR_ROLES)
    firsts = [first for first, _ in schema.names]
    named = next((first for first in firsts if first in given), None)
    if named is not None:
        return found_columns({named: given[named]}, columns)[named]
    known, _ = trained_columns({role: name for role, name in (trained or {}).items() if role in firsts}, columns)
    low = {name_key(name): name for name in reversed(columns)}
    found = [*known.values(), *(low[name] for name in dict.fromkeys((role, *schema.inputs)) if name in low)]
    if found or len(columns) == 1:
        return found[0] if found else columns[0]
    option = "--text" if role == LABELLED[0] else "--prompt"
    raise DataError(
        f"cannot tell which column has the inputs; the columns are {listed(columns)}: name one with {option} COLUMN"
    )


def aligned(table: Table, names: Sequence[str]) -> Table:
    """The table with its columns called as in the training table. Raises DataError if it lacks one."""
    found = {name: find_column(name, table.columns) for name in names}
    missing = [name for name, column in found.items() if column is None]
    if missing:
        raise DataError(f"{table.name} has no column {listed(missing, 60)}: its columns are {listed(table.columns)}")
    if all(name == column for name, column in found.items()):
        return table
    own = {name: column for name, column in found.items() if column is not None}
    return replace(
        table,
        columns=tuple(names),
        read=lambda columns: table.read([own[name] for name in columns]),
        classes={name: table.classes[column] for name, column in own.items() if column in table.classes},
    )


def find_group(data: DataSettings, columns: Sequence[str]) -> str | None:
    """The column of `data.group`. Raises DataError if the table lacks it."""
    return None if data.group is None else found_columns({"group": data.group}, columns)["group"]


def _named_pairs(given: dict[str, str], only: Schema | None) -> list[Roles]:
    """The pairs of roles of the columns that the recipe names."""
    pairs = [pair for pair in ROLES if given.keys() & set(pair)]
    if len(pairs) > 1:
        raise DataError(f"data names {' and '.join(given)}, which belong to different tasks: name one pair of columns")
    if pairs and only and pairs[0] not in only.names:
        raise DataError(f"data.{next(iter(given))} does not belong to {only.kind}: name {' and '.join(only.usual)}")
    return pairs


def _guess(schema: Schema, roles: Roles, given: dict[str, str], columns: Sequence[str]) -> tuple[str, str] | None:
    low = {name_key(name): name for name in reversed(columns)}
    first, second = given.get(roles[0]), given.get(roles[1])
    if first and second:
        return first, second
    for a, b in schema.names[roles]:
        pair = first or low.get(a), second or low.get(b)
        if pair[0] and pair[1] and pair[0] != pair[1]:
            return pair[0], pair[1]
    return None


def _not_found(given: dict[str, str], columns: Sequence[str], only: Schema | None) -> str:
    named = f" beside {listed(given.values(), 40)}" if given else ""
    if (only and LABELLED in only.names) or set(LABELLED) & given.keys():
        remedy = "set data.text and data.label (--text COLUMN --label COLUMN)"
    elif only:
        remedy = "set data.prompt and data.completion (--prompt COLUMN --completion COLUMN)"
    else:
        remedy = (
            "set data.text and data.label (--text, --label) to classify, or data.prompt and data.completion "
            "(--prompt, --completion) to write"
        )
    return f"cannot tell which columns to use{named}; the columns are {listed(columns, 60)}: {remedy}"
