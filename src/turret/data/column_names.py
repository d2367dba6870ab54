"""Finds columns of a table by their names, which are compared without case and blanks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from turret.data.settings import DataSettings
from turret.errors import DataError, listed, shown

# the keys of a recipe's [data] for an input and its output
PAIR_ROLES = ("text", "label", "document", "summary", "prompt", "completion")


def name_key(name: str) -> str:
    """Equal for names that differ in case or blanks only."""
    return " ".join(name.split()).casefold()


def named_columns(data: DataSettings, roles: Iterable[str]) -> dict[str, str]:
    """The columns that the recipe names for some roles, by role."""
    return {role: name for role in roles if (name := getattr(data, role)) is not None}


def find_column(name: str, columns: Sequence[str]) -> str | None:
    """The column of that name, or the only one that differs in case or blanks only."""
    if name in columns:
        return name
    alike = [column for column in columns if name_key(column) == name_key(name)]
    return alike[0] if len(alike) == 1 else None


def found_columns(given: Mapping[str, str], columns: Sequence[str]) -> dict[str, str]:
    """The columns by role, as the table spells them. Raises DataError, which names every one that is not there."""
    found = {role: column for role, name in given.items() if (column := find_column(name, columns)) is not None}
    missing = list(dict.fromkeys(name for role, name in given.items() if role not in found))
    if not missing:
        return found
    near = [difflib.get_close_matches(name_key(name), [name_key(each) for each in columns], n=1) for name in missing]
    meant = [shown(next(c for c in columns if name_key(c) == match[0]), 40) for match in near if match]
    no = f"is no column {shown(missing[0])}" if len(missing) == 1 else f"are no columns {listed(missing, 60)}"
    ask = f", did you mean {' and '.join(meant)}?" if meant else ""
    raise DataError(f"there {no}: the columns are {listed(columns, 80)}{ask}")


def trained_columns(trained: Mapping[str, str], columns: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """The columns that a version was trained on, as far as the table has them, and a note on the others.

    Args:
        trained: role -> column of the table that the version was trained on.
    """
    found = {role: column for role, name in trained.items() if (column := find_column(name, columns)) is not None}
    missing = [name for role, name in trained.items() if role not in found]
    note = f"the table lacks {listed(missing, 60)}, on which the version was trained" if missing else None
    return found, note
