"""Which column is the input and which the output. Guesses only what is obvious, and says what it guessed.

Refuses to know rows: names alone decide.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from turret.errors import DataError, listed, shown
from turret.tasks.task import Kind

_TEXTS = ("text", "sentence", "review", "content", "comment", "tweet", "message")
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "topic")
_PAIRS: dict[Literal["summarize", "generate"], tuple[tuple[str, str], ...]] = {
    "summarize": (
        ("document", "summary"), ("article", "highlights"), ("article", "summary"), ("text", "summary"),
        ("dialogue", "summary"), ("document", "headline"), ("article", "headline"), ("text", "headline"),
    ),
    "generate": (
        ("prompt", "completion"), ("instruction", "response"), ("instruction", "output"), ("question", "answer"),
        ("input", "output"), ("source", "target"),
    ),
}  # fmt: skip
_ROLES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "classify": (("text", "label"),),
    "summarize": (("document", "summary"), ("prompt", "completion")),
    "generate": (("prompt", "completion"), ("document", "summary")),
}


@dataclass(frozen=True)
class Columns:
    """The two columns that matter, under the names that a recipe gives them."""

    kind: Kind
    roles: dict[str, str]  # ("text", "label"), ("document", "summary") or ("prompt", "completion") -> column
    note: str | None  # the guess, where there was one

    @property
    def wanted(self) -> tuple[str, str]:
        first, second = self.roles.values()
        return first, second


def find_columns(data: Any, columns: Sequence[str], kind: Kind | None) -> Columns:
    """The columns that the recipe names, else the obvious ones among `columns`."""
    given = {role: name for pair in _ALL_ROLES for role in pair if (name := getattr(data, role, None)) is not None}
    pairs = _named_pairs(given, kind)
    kinds: list[Kind] = [kind] if kind else ["classify", "summarize", "generate"]
    for name in given.values():
        _check_there(name, columns)
    found = []
    for each in kinds:
        for pair in _ROLES[each] if kind else _ROLES[each][:1]:  # the other pair's names are welcome, not a sign
            if (not pairs or pair in pairs) and (guess := _guess(each, pair, given, columns)):
                found.append(Columns(each, dict(zip(pair, guess, strict=True)), None))
                break
    if not found:
        raise DataError(_not_found(given, columns, kind))
    if len(found) > 1 and not given:
        both = " and ".join(f"{f.kind} ({listed(f.wanted, 60)})" for f in found[:2])
        raise DataError(
            f"the columns {listed(columns, 80)} fit {both}: say task.kind, or name the columns under [data]"
        )
    best = found[0]
    if all(role in given for role in best.roles):
        return best
    said = ", ".join(f"{role} is column {name!r}" for role, name in best.roles.items() if role not in given)
    others = [name for name in columns if name not in best.wanted]
    note = f"guessed: {best.kind}, {said}" + (f"; not used: {', '.join(others)}" if others else "")
    return Columns(best.kind, best.roles, note)


def find_input(data: Any, columns: Sequence[str], kind: Kind) -> str:
    """The column of inputs in a table that need not have outputs."""
    role = {"classify": "text", "summarize": "document", "generate": "prompt"}[kind]
    named = getattr(data, role, None) or (None if kind == "classify" else data.document or data.prompt)
    if named is not None:
        _check_there(named, columns)
        return str(named)
    usual = _TEXTS if kind == "classify" else tuple(a for pairs in _PAIRS.values() for a, _ in pairs)
    low = {name.strip().lower(): name for name in reversed(columns)}
    found = [low[name] for name in dict.fromkeys((role, *usual)) if name in low]
    if found or len(columns) == 1:
        return found[0] if found else columns[0]
    raise DataError(
        f"cannot tell which column has the inputs; the columns are {listed(columns)}: name one with --column"
    )


_ALL_ROLES = (("text", "label"), ("document", "summary"), ("prompt", "completion"))


def _named_pairs(given: dict[str, str], kind: Kind | None) -> list[tuple[str, str]]:
    """The pairs of roles that the recipe's own names belong to."""
    pairs = [pair for pair in _ALL_ROLES if given.keys() & set(pair)]
    if len(pairs) > 1:
        raise DataError(f"data names {' and '.join(given)}, which belong to different tasks: name one pair of columns")
    if pairs and kind and pairs[0] not in _ROLES[kind]:
        raise DataError(f"data.{next(iter(given))} does not belong to {kind}: name {' and '.join(_ROLES[kind][0])}")
    return pairs


def _guess(kind: Kind, roles: tuple[str, str], given: dict[str, str], columns: Sequence[str]) -> tuple[str, str] | None:
    low = {name.strip().lower(): name for name in reversed(columns)}
    if kind == "classify":
        options = [(text, label) for text in _TEXTS for label in _LABELS]
    elif roles[0] == "document":
        options = list(_PAIRS["summarize"])
    else:
        options = list(_PAIRS["generate"])
    first, second = given.get(roles[0]), given.get(roles[1])
    if first and second:
        return first, second
    for a, b in options:
        pair = first or low.get(a), second or low.get(b)
        if pair[0] and pair[1] and pair[0] != pair[1]:
            return pair[0], pair[1]
    return None


def _check_there(name: str, columns: Sequence[str]) -> None:
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        meant = f", did you mean {shown(near[0])}?" if near else ""
        raise DataError(f"there is no column {shown(name)}: the columns are {listed(columns)}{meant}")


def _not_found(given: dict[str, str], columns: Sequence[str], kind: Kind | None) -> str:
    named = f" beside {listed(given.values(), 60)}" if given else ""
    if kind == "classify" or {"text", "label"} & given.keys():
        remedy = "set data.text and data.label, for example --set data.text=COLUMN --set data.label=COLUMN"
    elif kind:
        remedy = "set data.document and data.summary (or data.prompt and data.completion) to column names"
    else:
        remedy = "set data.text and data.label, or data.document and data.summary, to column names"
    return f"cannot tell which columns to use{named}; the columns are {listed(columns)}: {remedy}"
