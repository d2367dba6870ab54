"""The type of a recipe's `[data]`. `turret.recipe` imports this package, so it cannot be imported here."""

from __future__ import annotations

from typing import Protocol

Size = int | float | str | None  # a number of rows, a fraction, or the name of a split


class DataSettings(Protocol):
    """The fields of `turret.recipe.Data`."""

    source: str
    text: str | None
    label: str | None
    document: str | None
    summary: str | None
    prompt: str | None
    completion: str | None
    train: Size
    validation: Size
    test: Size
