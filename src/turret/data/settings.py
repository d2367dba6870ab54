"""The type of a recipe's `[data]`. `turret.recipe` imports this package, so it cannot be imported here."""

from __future__ import annotations

from typing import Protocol

from turret.data.table import FileFormat

Size = int | float | str | None  # a number of rows, a fraction, or the name of a split


class DataSettings(Protocol):
    """The fields of `turret.recipe.Data`."""

    source: str
    encoding: str | None
    delimiter: str | None
    header: bool | None
    sheet: str | None
    text: str | None
    label: str | None
    document: str | None
    summary: str | None
    prompt: str | None
    completion: str | None
    messages: str | None
    input: str | None
    system: str | None
    tools: str | None
    ignore: list[str] | None
    separator: str | None
    normalize_labels: bool | None
    drop_duplicates: bool | None
    group: str | None
    stratify: bool | None
    train: Size
    validation: Size
    test: Size


def format_of(data: DataSettings) -> FileFormat:
    """How the source's files are read, as far as the recipe says it."""
    return FileFormat(data.encoding, data.delimiter, data.header, data.sheet)
