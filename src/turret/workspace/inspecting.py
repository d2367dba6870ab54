"""What `turret.workspace.drafting` finds out about a table. Loads no numpy, so that a server can name it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """The first rows of a table, as text, and the splits that a training takes."""

    name: str
    columns: list[str]
    rows: list[list[str]]
    splits: dict[str, str]  # train, validation or test -> where its examples come from


@dataclass(frozen=True)
class Guess:
    """What was found out about a table: the task, the columns by their roles, the labels with their rows."""

    kind: str  # of the task
    columns: dict[str, str | list[str]]
    labels: dict[str, int]
    candidates: list[str]  # other columns that may be the label, the best first
    rows: int  # that were looked at
    more: bool  # whether the table has more


@dataclass(frozen=True)
class Inspection:
    """A table, and the recipe that is drafted for it."""

    name: str | None  # of the adapter
    recipe: str | None  # TOML with comments; None: `problem` says why there is none
    notes: list[str]
    table: Sample
    guess: Guess | None
    problem: str | None
