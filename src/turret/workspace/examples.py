"""Read golden examples from a table: a text per row, and what the answer to it must be. Loads no torch.

Columns: `text`, `prompt` or `document`; and `label`, `equals`, `contains`, or `expected` with `min_score`. If a table
has several of the latter, each row fills one.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import SupportsFloat

from turret.data import cells
from turret.data.source import open_table
from turret.data.table import CellValue, Table
from turret.errors import DataError, shown
from turret.store.golden import CHECKS, MOST_EXAMPLES, Example, GoldenSet, shortly

TEXTS = ("text", "prompt", "document")
SCORE = "min_score"


def read_examples(path: str | Path) -> GoldenSet:
    """The examples of a table, in order. Raises DataError that names the line."""
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):  # Path.is_file raises for some names
        raise DataError(
            f"there is no file {shown(str(path), 100)}: give a table of golden examples, such as golden.csv"
        )
    table = open_table(path)
    text, checks = _columns(table)
    examples: list[Example] = []
    columns = [text, *checks, *([SCORE] if SCORE in table.columns else [])]
    for place, row in table.read(columns):
        cells_by_column = dict(zip(columns, row, strict=True))
        try:
            examples.append(_example(cells_by_column.pop(text), cells_by_column))
        except DataError as error:
            raise DataError(f"{table.name} {table.unit} {place}: {error}") from None
        if len(examples) > MOST_EXAMPLES:
            raise DataError(f"{table.name} has more than {MOST_EXAMPLES} golden examples: keep fewer")
    if not examples:
        raise DataError(f"{table.name} has columns and no rows: give at least one golden example")
    _refuse_contradictions(table, examples)
    return GoldenSet(tuple(examples))


def _columns(table: Table) -> tuple[str, list[str]]:
    """The column of the texts, and the columns of the checks."""
    texts = [name for name in TEXTS if name in table.columns]
    checks = [name for name in CHECKS if name in table.columns]
    columns = ", ".join(table.columns)
    if len(texts) != 1:
        raise DataError(f"{table.name} needs one column {', '.join(TEXTS[:-1])} or {TEXTS[-1]}: it has {columns}")
    if not checks:
        raise DataError(
            f"{table.name} has no column with expected answers: add {', '.join(CHECKS[:-1])} or "
            f"{CHECKS[-1]} (with {SCORE}); it has {columns}"
        )
    if unknown := [name for name in table.columns if name not in (*texts, *checks, SCORE)]:
        raise DataError(
            f"{table.name} has an unknown column {unknown[0]!r}: known are {', '.join((*TEXTS, *CHECKS, SCORE))}"
        )
    if ("expected" in checks) != (SCORE in table.columns):
        raise DataError(f"{table.name}: the columns expected and {SCORE} come together; it has {columns}")
    return texts[0], checks


def _example(text: CellValue, row: dict[str, CellValue]) -> Example:
    """One example.

    Args:
        row: the other columns of the row.
    """
    source = cells.text_of(text)
    if source is None:
        raise DataError("the text is missing")
    score = _score(row.pop(SCORE, None))
    filled = {check: wanted for check, cell in row.items() if (wanted := _wanted(check, cell))}
    if len(filled) != 1:
        found = " and ".join(filled) if filled else "nothing"
        raise DataError(f"expected one of {', '.join(row)}, found {found}")
    ((check, wanted),) = filled.items()
    if (check == "expected") != (score is not None):
        raise DataError(f"expected and {SCORE} come together, and other checks have no score")
    return Example(source, check, wanted, score)


def _wanted(check: str, cell: CellValue) -> str | tuple[str, ...] | None:
    if check == "label":
        return cells.label_of(cell, (), multi_label=isinstance(cell, list | tuple))
    if check == "contains" and isinstance(cell, list | tuple):
        parts = tuple(cells.text_of(part) for part in cell)
        if not all(parts):
            raise DataError("contains lists a text that is missing")
        return tuple(part for part in parts if part)
    return cells.text_of(cell)


def _score(cell: CellValue) -> float | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell)):
        return None
    try:
        score = float(cell) if isinstance(cell, str | bytes | SupportsFloat) else math.nan
    except ValueError:
        score = math.nan
    if isinstance(cell, bool) or not 0 < score <= 1:
        raise DataError(f"{SCORE} {shortly(cell)}: expected a number above 0 and at most 1")
    return score


def _refuse_contradictions(table: Table, examples: list[Example]) -> None:
    """No version can pass if one text requires two labels, or must equal two texts."""
    seen: dict[tuple[str, str], str | tuple[str, ...]] = {}
    for example in examples:
        if example.check in ("label", "equals") and seen.setdefault((example.text, example.check), example.wanted) != (
            example.wanted
        ):
            both = f"{shortly(seen[example.text, example.check])} and {shortly(example.wanted)}"
            raise DataError(f"{table.name} requires {both} for {shortly(example.text)}: no version can answer both")
