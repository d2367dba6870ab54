"""Finds the columns of conversations: one column with all turns, or a question and its answer in columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turret.data.cells import Replacements, text_of
from turret.data.column_names import (
    PAIR_ROLES,
    find_column,
    found_columns,
    name_key,
    named_columns,
    trained_columns,
)
from turret.data.conversations import conversation_of, prompt_of, question, turns_of
from turret.data.examples import Conversation, Prompt, Turn
from turret.data.settings import DataSettings
from turret.data.table import CellValue
from turret.errors import DataError, listed, shown

WHOLE = ("messages", "conversations")  # column names of all turns
MORE_WHOLE = ("conversation", "chat", "dialog")  # obvious only if the task is known
INSTRUCTED = (("instruction", "output"), ("instruction", "response"))
MORE_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("source", "target"))
BESIDE = ("input", "system", "tools")  # roles that have the names of their usual columns
ROLES = ("messages", "prompt", "completion", *BESIDE)  # the keys of a recipe's [data] for conversations


@dataclass(frozen=True)
class Layout:
    """The columns of conversations, by role: `messages`, or `prompt`, `completion` and often `input`."""

    roles: dict[str, str]  # role -> column

    @property
    def whole(self) -> bool:
        """Whether one column has all turns."""
        return "messages" in self.roles

    def conversation(
        self, cells: Sequence[CellValue], replaced: Replacements, changes: Counter[str]
    ) -> Conversation | str:
        """The conversation in the cells of a row, or the column that lacks a value. Raises DataError.

        Args:
            cells: in the order of `roles`.
            replaced: counts replaced characters.
            changes: counts conversations that lose turns.
        """
        row = self._row(cells)
        system = self._text(row, "system", replaced)
        if self.whole:
            turns = self._turns(row, "messages", replaced)
            found = None if turns is None else conversation_of(turns, row.get("tools"), system, changes)
            return self.roles["messages"] if found is None else found
        asked = self._asked(row, replaced)
        if asked is None:
            return self.roles["prompt"]
        answers = self._side(row, "completion", "assistant", replaced)
        found = None if answers is None else conversation_of([*asked, *answers], row.get("tools"), system, changes)
        return self.roles["completion"] if found is None else found

    def prompt(self, cells: Sequence[CellValue], replaced: Replacements) -> Prompt | None:
        """What is asked in the cells of a row; None if they are missing. Turns after the last question are answers."""
        row = self._row(cells)
        system = self._text(row, "system", replaced)
        turns = self._turns(row, "messages", replaced) if self.whole else self._asked(row, replaced)
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        return prompt_of(turns, row.get("tools"), system) if turns else None

    def _row(self, cells: Sequence[CellValue]) -> dict[str, CellValue]:
        return dict(zip(self.roles, cells, strict=True))

    def _asked(self, row: Mapping[str, CellValue], replaced: Replacements) -> list[Turn] | None:
        turns = self._side(row, "prompt", "user", replaced)
        more = self._text(row, "input", replaced)
        if turns is None or more is None:
            return turns
        last = turns[-1]
        return [*turns[:-1], Turn(last.role, question(last.content, more))]

    def _side(self, row: Mapping[str, CellValue], role: str, speaker: str, replaced: Replacements) -> list[Turn] | None:
        """A cell with a text, or with turns."""
        if isinstance(row[role], (list, tuple)):
            return self._turns(row, role, replaced)
        text = self._text(row, role, replaced)
        return None if text is None else [Turn(speaker, text)]

    def _turns(self, row: Mapping[str, CellValue], role: str, replaced: Replacements) -> list[Turn] | None:
        try:
            return turns_of(row[role], replaced)
        except DataError as error:
            raise DataError(f"column {shown(self.roles[role], 40)}: {error}") from None

    def _text(self, row: Mapping[str, CellValue], role: str, replaced: Replacements) -> str | None:
        try:
            return text_of(row.get(role), replaced)
        except DataError as error:
            raise DataError(f"column {shown(self.roles[role], 40)}: {error}") from None


def find_layout(given: Mapping[str, str], columns: Sequence[str], *, known: bool, asks: bool = False) -> Layout | None:
    """The columns that the recipe names, else those with an obvious name; None if there are none.

    Args:
        given: columns that the recipe names, by role.
        columns: of the table.
        known: whether the task is known, so that more names are obvious.
        asks: whether the table may have questions without answers.
    """
    low = {name_key(name): name for name in reversed(columns)}
    roles = {role: given[role] for role in ROLES if role in given}
    if not roles.keys() & {"messages", "prompt", "completion"}:
        names = (*WHOLE, *(MORE_WHOLE if known else ()))
        if whole := next((low[name] for name in names if name in low), None):
            roles = {"messages": whole} | roles
    if "messages" not in roles:
        pairs = (*INSTRUCTED, *(MORE_PAIRS if known or given else ()))
        for first, second in pairs:
            asked, answer = roles.get("prompt", low.get(first)), roles.get("completion", low.get(second))
            if asked and (answer or asks):
                roles = {"prompt": asked, **({"completion": answer} if answer else {})} | roles
                break
    if not ("messages" in roles or ("prompt" in roles and ("completion" in roles or asks))):
        return None
    taken = set(roles.values())
    for role in BESIDE:
        applies = role != "input" or "messages" not in roles
        if applies and role not in roles and role in low and low[role] not in taken:
            roles[role] = low[role]
    if asks:
        roles.pop("completion", None)
    return Layout(roles)


# --- what a recipe or a version names ---------------------------------------------------------------------------------


def kept_columns(data: DataSettings, columns: Sequence[str]) -> list[str]:
    """The columns that `data.ignore` leaves. Raises DataError if it names one that is not there, or that is used."""
    ignored = found_columns({name: name for name in data.ignore or ()}, columns)
    named = named_columns(data, (*PAIR_ROLES, *ROLES))
    if used := next((role for role, name in named.items() if find_column(name, list(ignored.values()))), None):
        raise DataError(f"data.ignore and data.{used} both name the column {shown(named[used], 40)}: keep one of them")
    return [name for name in columns if name not in ignored.values()]


def named_layout(
    data: DataSettings, columns: Sequence[str], kind: str, *, known: bool, trained: Mapping[str, str] | None = None
) -> Layout | None:
    """The columns of conversations, if the recipe names them, asks for the task, or the table shows them.

    Args:
        columns: those that `data.ignore` leaves.
        kind: of the task whose examples are conversations.
        known: whether the recipe names that task.
        trained: role -> column of the table that a version was trained on; used if nothing is named.

    Raises:
        DataError: a column that the recipe names is not there, or they do not belong together.
    """
    given = named_columns(data, ROLES)
    own = [role for role in given if role not in PAIR_ROLES]  # roles that no other task has
    foreign = [role for role in named_columns(data, PAIR_ROLES) if role not in ROLES]
    if known and foreign:
        raise DataError(f"data.{foreign[0]} does not belong to {kind}: name data.messages, or prompt and completion")
    if not known and (foreign or (given and not own)):
        return None
    again = {} if given else _as_trained(trained, columns)[0]
    if "messages" in again or again.keys() >= {"prompt", "completion"}:
        return Layout(again)
    layout = find_layout(found_columns(given, columns), columns, known=known)
    if layout is None and (known or own):
        remedy = "name data.messages, or data.prompt and data.completion"
        raise DataError(f"cannot tell which columns to use; the columns are {listed(columns)}: {remedy}")
    return layout


def require_no_layout(data: DataSettings, kind: str) -> None:
    """Raise DataError if the recipe names a column that only conversations have, and asks for another task."""
    if own := next((role for role in named_columns(data, ROLES) if role not in PAIR_ROLES), None):
        raise DataError(f'data.{own} does not belong to {kind}: set task.kind = "chat", or leave it out')


def prompt_layout(data: DataSettings, columns: Sequence[str], trained: Mapping[str, str] | None = None) -> Layout:
    """The columns of conversations that may have no answers. Raises DataError."""
    kept, given = kept_columns(data, columns), named_columns(data, ROLES)
    again = {} if given else _as_trained(trained, kept)[0]
    if again.keys() & {"messages", "prompt"}:
        return Layout({role: name for role, name in again.items() if role != "completion"})
    layout = find_layout(found_columns(given, kept), kept, known=True, asks=True)
    if layout is None:
        raise DataError(
            f"cannot tell which column has the conversations; the columns are {listed(columns)}: "
            "name data.messages or data.prompt"
        )
    return layout


def layout_note(
    data: DataSettings, kind: str, layout: Layout, columns: Sequence[str], trained: Mapping[str, str] | None = None
) -> str | None:
    """What was guessed or is missing, and which columns are not used; None if the recipe names all of them."""
    given = named_columns(data, ROLES)
    if trained and not given:
        return _as_trained(trained, columns)[1]
    guessed = [f"{role} is column {name!r}" for role, name in layout.roles.items() if role not in given]
    unused = [name for name in columns if name not in layout.roles.values()]
    if not guessed:
        return None
    return f"guessed: {kind}, {', '.join(guessed)}" + (f"; not used: {', '.join(unused)}" if unused else "")


def _as_trained(trained: Mapping[str, str] | None, columns: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """The columns of conversations that a version was trained on, as in `trained_columns`."""
    return trained_columns({role: trained[role] for role in ROLES if role in trained} if trained else {}, columns)
