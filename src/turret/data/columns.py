"""Finds the columns of a table: those that the recipe names, else those with an obvious name.

Names are compared without case and outer blanks. A task's `Schema` lists its obvious names. Conversations have one
column with all turns, or a question and its answer in columns. A note reports each guess. Tables of tasks that this
version does not have are refused by the name of their task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from turret.data.cells import RowReader, label_of
from turret.data.examples import Example
from turret.data.table import (
    ROLES,
    Answers,
    CellValue,
    DataSettings,
    Table,
    TableRow,
    find_column,
    is_missing,
    list_columns,
    name_key,
    require_columns,
)
from turret.errors import DataError, listed, shown

Roles = tuple[str, ...]  # keys of a recipe's [data]: the input columns, then the answer columns
LABELLED: Roles = ("text", "label")
PAIRED: Roles = ("text", "text_pair", "label")
SUMMARISED: Roles = ("document", "summary")
COMPLETED: Roles = ("prompt", "completion")
COMPARED: Roles = ("prompt", "chosen", "rejected")
TAGGED: Roles = ("tokens", "tags")
SPANNED: Roles = ("text", "spans")
TRIPLE: Roles = ("anchor", "positive", "negative")
OPTIONS = ("text", "text_pair", "label", "prompt", "completion", "messages")  # with an option of the command line
PLAIN_ROLES = ROLES[: ROLES.index("messages")]

WHOLE = ("messages", "conversations")  # column names of all turns
MORE_WHOLE = ("conversation", "chat", "dialog")  # obvious only if the task is known
INSTRUCTED = (("instruction", "output"), ("instruction", "response"))
MORE_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("source", "target"))
BESIDE = ("input", "system", "tools")  # roles that have the names of their usual columns
CHAT_ROLES = ("messages", "prompt", "completion", *BESIDE)  # the keys of a recipe's [data] for conversations

BESIDE_ALL = ("input", "inputs", "context", "passage", "history")  # columns that an answer usually depends on
BESIDE_PAIR = (*BESIDE_ALL, "instruction", "question", "query", "prompt", "system", "tools")


@dataclass(frozen=True)
class Schema:
    """The columns that one task reads from a table, and the examples that it makes.

    Args:
        kind: of the task.
        names: by roles, the usual ones first, column names that are obvious for them.
        inputs: column names that are obvious if only one text is asked.
        example: makes the example of a row. Raises DataError for a wrong cell, Missing for one without a value.
        classes: whether answers are classes, which are counted, checked and listed.
        many: whether an example has any number of classes.
        conversations: whether the examples are conversations, whose columns have names of their own.
        show: how many of `names` show the task; others need the task's name.
        answers: how many of the roles, at the end, are answers.
        converses: whether what is asked is a conversation.
        spans: whether an answer is spans of the text, each with a class.
        several: whether several columns have an answer each: `data.label` is a list.
    """

    kind: str
    names: Mapping[Roles, Sequence[tuple[str, ...]]]
    inputs: Sequence[str]
    example: Callable[[RowReader], Example]
    classes: bool = False
    many: bool = False
    conversations: bool = False
    show: int = 1
    answers: int = 1
    converses: bool = False
    spans: bool = False
    several: bool = False

    @property
    def usual(self) -> Roles:
        """The roles of its columns if a recipe names none."""
        return next(iter(self.names))

    @property
    def roles(self) -> Roles:
        """All roles that a recipe may give a column."""
        own = CHAT_ROLES if self.conversations else ()
        return tuple(dict.fromkeys([*own, *(role for roles in self.names for role in roles)]))


@dataclass(frozen=True)
class Columns:
    """The columns of a table that a task reads, by their roles."""

    schema: Schema
    roles: dict[str, str]  # ("text", "label"), ("document", "summary") or ("prompt", "completion") -> column
    note: str | None  # what was guessed

    @property
    def answer(self) -> str:
        """The column of the right answer."""
        return list(self.roles.values())[-1]


@dataclass(frozen=True)
class Finder:
    """Finds the columns of one table.

    Args:
        data: a recipe's `[data]`.
        columns: of the table, without those that `data.ignore` leaves out.
        trained: role -> column of the table that a version was trained on, for what the recipe does not name. The table
            may lack it.
    """

    data: DataSettings
    columns: Sequence[str]
    trained: Mapping[str, str]

    @classmethod
    def of(cls, data: DataSettings, columns: Sequence[str], trained: Mapping[str, str] | None = None) -> Finder:
        """Raises DataError if `data.ignore` names a column that is not there, or that is used."""
        return cls(data, kept_columns(data, columns), trained or {})

    @cached_property
    def by_name(self) -> dict[str, str]:
        """Each column by its name without case and blanks; of equal names the first column."""
        return {name_key(name): name for name in reversed(self.columns)}

    def given(self, roles: Iterable[str]) -> dict[str, str]:
        """The columns that the recipe names for some roles. Raises DataError for one that is not there."""
        return require_columns(named_columns(self.data, roles), self.columns)

    def known(self, roles: Iterable[str]) -> tuple[dict[str, str], str | None]:
        """The columns that the version was trained on, as far as the table has them, and a note on the others."""
        own = {role: self.trained[role] for role in roles if role in self.trained}
        found = {role: column for role, name in own.items() if (column := find_column(name, self.columns)) is not None}
        missing = [name for role, name in own.items() if role not in found]
        return found, f"the table lacks {listed(missing, 60)}, on which the version was trained" if missing else None

    def find(self, schemas: Sequence[Schema]) -> Columns:
        """The columns that the recipe names, else those with an obvious name. Raises DataError.

        Args:
            schemas: of the recipe's task; of all tasks if the columns have to decide which it is.
        """
        task = schemas[0] if len(schemas) == 1 else None
        for schema in (schema for schema in schemas if schema.conversations):
            if conversations := self._conversations(schema, named=task is not None):
                return conversations
        chat = [role for role in named_columns(self.data, CHAT_ROLES) if role not in PLAIN_ROLES]
        if task and (strange := [role for role in chat if role not in task.roles]):
            raise DataError(
                f'data.{strange[0]} does not belong to {task.kind}: set task.kind = "chat", or leave it out'
            )
        schemas = [schema for schema in schemas if not schema.conversations]
        only = schemas[0] if len(schemas) == 1 else None
        given = self.given(dict.fromkeys((*PLAIN_ROLES, *(role for schema in schemas for role in schema.roles))))
        known, lacks = self.known(self.trained)
        note = None if given else lacks
        if given:  # the version knows the others
            own = [roles for roles in schemas[0].names if given.keys() & set(roles)]
            of_it: Roles = next((roles for roles in own if known.keys() <= set(roles)), next(iter(own), ()))
            known = {role: name for role, name in known.items() if role in of_it}
        given = {**given, **{role: name for role, name in known.items() if role not in given}}
        _check_named(given, only)
        found = []
        for schema in schemas:
            shown = list(schema.names) if only else list(schema.names)[: schema.show]
            for roles in sorted(shown, key=len, reverse=True):
                if given.keys() <= set(roles) and (guess := self._guess(roles, schema.names[roles], given)):
                    found.append(Columns(schema, guess, note))
                    break
        if not found:
            if not given:
                refuse_later(self.columns)
            raise DataError(_not_found(given, self.columns, only))
        found.sort(key=lambda each: (each.roles.keys() != given.keys(), -len(each.roles)))
        if len(found) > 1 and not given and len(found[0].roles) == len(found[1].roles):
            both = " and ".join(f"{f.schema.kind} ({listed(f.roles.values(), 60)})" for f in found[:2])
            raise DataError(
                f"the columns {listed(self.columns, 80)} fit {both}: set task.kind (--task), or name the columns under "
                "[data]"
            )
        notes = [note, self._guess_note(found[0].schema, found[0].roles, given)]
        return replace(found[0], note="; ".join(filter(None, notes)) or None)

    def inputs(self, schema: Schema) -> dict[str, str]:
        """The input columns by role. The table may have no answers. Raises DataError."""
        if schema.conversations or schema.converses:
            return self._questions()
        asked = [roles[: -schema.answers] for roles in schema.names]
        of_them = [role for role in PLAIN_ROLES if _in(role, asked)]
        given, (known, _) = self.given(of_them), self.known(role for role in self.trained if _in(role, asked))
        if given or not self.trained:
            fitting = [roles for roles in asked if given.keys() <= set(roles)]
        else:
            fitting = [roles for roles in asked if known.keys() == set(roles)]
        for roles in sorted(fitting, key=len, reverse=True):
            every = [names for own, names in schema.names.items() if own[: -schema.answers] == roles]
            obvious = [each[: len(roles)] for names in every for each in names]
            if len(roles) > 1 and (guess := self._guess(roles, obvious, {**known, **given})):
                return guess
        single = [roles[0] for roles in asked if len(roles) == 1]
        if role := next((role for role in single if role in given), None):
            return {role: given[role]}
        first = schema.usual[0]
        if single:
            names = [name for role, name in known.items() if role in single]
            names += [self.by_name[name] for name in dict.fromkeys((first, *schema.inputs)) if name in self.by_name]
            if names or len(self.columns) == 1:
                return {single[0]: names[0] if names else self.columns[0]}
        options = " ".join(map(_option, asked[0])) if first == "text" else "--prompt COLUMN"
        one = len(asked[0]) == 1
        which = "which column has the inputs" if one else "which columns have the two texts"
        raise DataError(
            f"cannot tell {which}; the columns are {list_columns(self.columns)}: name {'one' if one else 'them'} with "
            f"{options}"
        )

    def _guess(
        self, roles: Roles, obvious: Sequence[tuple[str, ...]], given: Mapping[str, str]
    ) -> dict[str, str] | None:
        """A column for each role: the given one, else the one with an obvious name."""
        for names in [("",) * len(roles), *obvious]:
            guess = {
                role: given.get(role) or self.by_name.get(name, "") for role, name in zip(roles, names, strict=True)
            }
            if all(guess.values()) and len(set(guess.values())) == len(guess):
                return guess
        return None

    def _guess_note(self, schema: Schema, roles: Mapping[str, str], given: Mapping[str, str]) -> str | None:
        """What was guessed, and which columns are not used; None if the recipe names all that are."""
        guessed = [f"{role} is column {name!r}" for role, name in roles.items() if role not in given]
        unused = [name for name in self.columns if name not in roles.values()]
        others = f"; not used: {', '.join(unused)}" if unused else ""
        return f"guessed: {schema.kind}, {', '.join(guessed)}{others}" if guessed else None

    # --- conversations ------------------------------------------------------------------------------------------------

    def _conversations(self, schema: Schema, *, named: bool) -> Columns | None:
        """The columns of conversations, if the recipe names them, asks for the task, or the table shows them.

        Args:
            named: whether the recipe names that task.
        """
        given = named_columns(self.data, CHAT_ROLES)
        own = [role for role in given if role not in PLAIN_ROLES]  # roles that no other task has
        foreign = [role for role in named_columns(self.data, PLAIN_ROLES) if role not in CHAT_ROLES]
        if named and foreign:
            remedy = "name data.messages, or prompt and completion"
            raise DataError(f"data.{foreign[0]} does not belong to {schema.kind}: {remedy}")
        if not named and (foreign or (given and not own)):
            return None
        known, lacks = self.known(() if given else CHAT_ROLES)
        if "messages" in known or known.keys() >= {"prompt", "completion"}:
            return Columns(schema, known, lacks)
        roles = self._conversation_roles(known=named)
        if roles is None and (named or own):
            remedy = "name data.messages, or data.prompt and data.completion"
            raise DataError(f"cannot tell which columns to use; the columns are {list_columns(self.columns)}: {remedy}")
        if roles is None:
            return None
        return Columns(schema, roles, lacks if self.trained and not given else self._guess_note(schema, roles, given))

    def _questions(self) -> dict[str, str]:
        """The columns of conversations that may have no answers, by role. Raises DataError."""
        known, _ = self.known(() if named_columns(self.data, CHAT_ROLES) else CHAT_ROLES)
        roles = known if known.keys() & {"messages", "prompt"} else self._conversation_roles(known=True, asks=True)
        if roles is None:
            raise DataError(
                f"cannot tell which column has the conversations; the columns are {list_columns(self.columns)}: "
                "name data.messages or data.prompt"
            )
        return {role: name for role, name in roles.items() if role != "completion"}

    def _conversation_roles(self, *, known: bool, asks: bool = False) -> dict[str, str] | None:
        """The columns that the recipe names, else those with an obvious name, by role; None if there are none.

        Args:
            known: whether the task is known, so that more names are obvious.
            asks: whether the table may have questions without answers.
        """
        roles, low = self.given(CHAT_ROLES), self.by_name
        given = bool(roles)
        if not roles.keys() & {"messages", "prompt", "completion"}:
            names = (*WHOLE, *(MORE_WHOLE if known else ()))
            if whole := next((low[name] for name in names if name in low), None):
                roles = {"messages": whole} | roles
        if "messages" not in roles:
            for first, second in (*INSTRUCTED, *(MORE_PAIRS if known or given else ())):
                asked, answer = roles.get("prompt", low.get(first)), roles.get("completion", low.get(second))
                if asked and (answer or asks):
                    roles = {"prompt": asked, **({"completion": answer} if answer else {})} | roles
                    break
            else:
                return None
        for role in BESIDE:
            applies = role not in roles and (role != "input" or "messages" not in roles)
            if applies and role in low and low[role] not in roles.values():
                roles[role] = low[role]
        return roles


def _in(role: str, every: Iterable[Roles]) -> bool:
    return any(role in roles for roles in every)


def _option(role: str) -> str:
    return f"--{role.replace('_', '-')} COLUMN"


def align_columns(table: Table, names: Sequence[str]) -> Table:
    """The table with its columns called as in the training table. Raises DataError if it lacks one."""
    found = {name: find_column(name, table.columns) for name in names}
    missing = [name for name, column in found.items() if column is None]
    if missing:
        raise DataError(
            f"{table.name} has no column {listed(missing, 60)}: its columns are {list_columns(table.columns)}"
        )
    if all(name == column for name, column in found.items()):
        return table
    own = {name: column for name, column in found.items() if column is not None}
    return replace(
        table,
        columns=tuple(names),
        read=lambda columns: table.read([own[name] for name in columns]),
        classes={name: table.classes[column] for name, column in own.items() if column in table.classes},
    )


def fitting_schemas(data: DataSettings, schemas: Sequence[Schema]) -> list[Schema]:
    """The schemas that read as many columns of answers as `data.label` names. Raises DataError without any."""
    several = isinstance(data.label, list)
    found = [schema for schema in schemas if schema.several == several]
    if not found:
        kind = schemas[0].kind
        raise DataError(
            f"{kind} reads one column of answers, and data.label is a list: name one column, or leave task.kind out"
            if several
            else f'{kind} answers several questions: name their columns, such as data.label = ["topic", "urgent"]'
        )
    return found


def with_answers(table: Table, names: Sequence[str]) -> Table:
    """The table with some columns as one, whose cells are `Answers`; as it is if it lacks one of them."""
    found = {name: column for name in names if (column := find_column(name, table.columns)) is not None}
    if len(found) < len(names):
        return table
    whole = column_of(names)

    def answer(name: str, cell: CellValue) -> CellValue:
        classes = table.classes.get(found[name])
        return cell if classes is None else label_of(cell, classes, multi_label=False)

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        own = [each for column in columns for each in (found.values() if column == whole else [column])]
        for place, row in table.read(own):
            cells = dict(zip(own, row, strict=True))
            answers = Answers((name, answer(name, cells.get(column))) for name, column in found.items())
            yield place, tuple(answers if column == whole else cells[column] for column in columns)

    others = tuple(column for column in table.columns if column not in found.values())
    return replace(table, columns=(*others, whole), read=read)


def _check_named(given: Mapping[str, str], only: Schema | None) -> None:
    """Raise DataError if no task has all the columns that the recipe names."""
    every = (LABELLED, PAIRED, SUMMARISED, COMPLETED, ("system", *COMPARED), TAGGED, SPANNED, TRIPLE)
    of_a_task = [set(roles) for roles in every]
    if not any(given.keys() <= roles for roles in of_a_task):
        raise DataError(f"data names {' and '.join(given)}, which belong to different tasks: name one pair of columns")
    if only and not any(given.keys() <= set(roles) for roles in only.names):
        strange = next(role for role in given if not _in(role, list(only.names)) or len(given) > 1)
        raise DataError(f"data.{strange} does not belong to {only.kind}: name {' and '.join(only.usual)}")


def _not_found(given: Mapping[str, str], columns: Sequence[str], only: Schema | None) -> str:
    known = [LABELLED, SUMMARISED, COMPLETED, PAIRED] if only is None else list(only.names)
    roles = next((roles for roles in known if given.keys() <= set(roles)), known[0]) if given else known[0]
    if given:
        role = next((role for role in roles if role not in given), roles[-1])
        named = f" beside {listed(given.values(), 40)}"
        what = f"the {role}{named} is" if role in OPTIONS else f"data.{role}{named} is"
        remedy = f"add {_option(role)}" if role in OPTIONS else f"set data.{role}"
        return f"cannot tell which column {what}; the columns are {list_columns(columns)}: {remedy}"
    if only:
        roles = COMPLETED if roles == SUMMARISED else roles
        keys = [f"data.{role}" for role in roles]
        options = " ".join(map(_option, roles))
        remedy = f"set {', '.join(keys[:-1])} and {keys[-1]} ({options})"
    else:
        remedy = "set data.text and data.label (--text, --label) to classify, or --prompt and --completion to write"
    return f"cannot tell which columns to use; the columns are {list_columns(columns)}: {remedy}"


# --- names -----------------------------------------------------------------------------------------------------------


def named_columns(data: DataSettings, roles: Iterable[str]) -> dict[str, str]:
    """The columns that the recipe names for some roles, by role."""
    return {role: column_of(name) for role in roles if (name := getattr(data, role)) is not None}


def column_of(name: str | Sequence[str]) -> str:
    """The column of a name; several names are the columns that `with_answers` makes one of."""
    return name if isinstance(name, str) else ", ".join(name)


def kept_columns(data: DataSettings, columns: Sequence[str]) -> list[str]:
    """The columns that `data.ignore` leaves. Raises DataError if it names one that is not there, or that is used."""
    ignored = require_columns({name: name for name in data.ignore or ()}, columns)
    named = named_columns(data, (*PLAIN_ROLES, *CHAT_ROLES))
    if used := next((role for role, name in named.items() if find_column(name, list(ignored.values()))), None):
        raise DataError(f"data.ignore and data.{used} both name the column {shown(named[used], 40)}: keep one of them")
    return [name for name in columns if name not in ignored.values()]


# --- what cannot be learnt -------------------------------------------------------------------------------------------


def check_unused(data: DataSettings, table: Table, found: Columns) -> None:
    """Raise DataError if a column with values looks like input, is not used, and is not in `data.ignore`."""
    names = BESIDE_ALL if "messages" in found.roles else BESIDE_PAIR
    for name in kept_columns(data, table.columns):
        if name in found.roles.values() or name_key(name) not in names or not _has_values(table, name):
            continue
        remedy = (
            "name it under [data]" if found.schema.conversations else 'name it in data.input with task.kind = "chat"'
        )
        raise DataError(
            f"{table.name} has the column {shown(name, 40)}, which looks like input, and {found.schema.kind} does "
            f"not use it: {remedy}, or drop it with data.ignore = [{shown(name, 40)}]"
        )


def _has_values(table: Table, column: str) -> bool:
    return any(not is_missing(cell) and cell not in ([], {}) for _, (cell,) in table.read([column]))


def later_task_of(columns: Sequence[str]) -> str | None:
    """The task of a later version that a table with these columns belongs to."""
    names = {name_key(name) for name in columns}
    return "question_answering" if {"question", "context"} <= names and names & {"answers", "answer"} else None


def refuse_later(columns: Sequence[str]) -> None:
    """Raise DataError if the columns are those of a task that this version does not have."""
    if (task := later_task_of(columns)) is None:
        return
    used = [name for name in columns if name_key(name) in ("question", "context", "answers", "answer")]
    raise DataError(
        f"the columns {listed(used, 80)} belong to the task {task} (answers inside a context), which a later version "
        "will have: give another table, or name columns of a task of this version"
    )
