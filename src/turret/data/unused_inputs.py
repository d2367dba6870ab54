"""Refuses tables from which nothing could be learnt: an input that is not used, or one that is always the same."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from turret.data.column_names import name_key
from turret.data.columns import Columns
from turret.data.layouts import kept_columns
from turret.data.settings import DataSettings
from turret.data.table import CellValue, Table
from turret.errors import DataError, shown

BESIDE_ALL = ("input", "inputs", "context", "passage", "history")  # columns that an answer usually depends on
BESIDE_PAIR = (*BESIDE_ALL, "instruction", "question", "query", "prompt", "system", "tools")
FEWEST = 10  # training examples; fewer may be equal by chance
CONSTANT = 0.9  # share of the training examples with the same input from which on it counts as constant


def check_unused(data: DataSettings, table: Table, found: Columns) -> None:
    """Raise DataError if a column with values looks like input, is not used, and is not in `data.ignore`."""
    names = BESIDE_ALL if found.layout is not None and found.layout.whole else BESIDE_PAIR
    for name in kept_columns(data, table.columns):
        if name in found.roles.values() or name_key(name) not in names or not _has_values(table, name):
            continue
        remedy = "name it under [data]" if found.layout else 'name it in data.input with task.kind = "chat"'
        raise DataError(
            f"{table.name} has the column {shown(name, 40)}, which looks like input, and {found.schema.kind} does "
            f"not use it: {remedy}, or drop it with data.ignore = [{shown(name, 40)}]"
        )


def _has_values(table: Table, column: str) -> bool:
    return any(_is_value(cell) for _, (cell,) in table.read([column]))


def _is_value(cell: CellValue) -> bool:
    if isinstance(cell, str):
        return bool(cell.strip())
    return cell is not None and cell == cell and cell not in ([], {})  # NaN is not equal to itself


def check_varied(inputs: npt.NDArray[np.uint64], both: npt.NDArray[np.uint64], found: Columns) -> None:
    """Raise DataError if nearly all training examples ask the same and are answered differently.

    Args:
        inputs: a hash of each training input (N,).
        both: a hash of each training input with its output (N,).
        found: the columns; a table with classes is not judged.
    """
    if found.schema.classes or len(inputs) < FEWEST:
        return
    values, counts = np.unique(inputs, return_counts=True)
    most = int(np.max(counts))
    if most >= CONSTANT * len(inputs) and len(np.unique(both)) > len(values):
        raise DataError(
            f"{most} of {len(inputs)} training examples have the same input (column "
            f"{shown(next(iter(found.roles.values())), 40)}), so no answer can be learnt from it: "
            "name the columns that differ under [data], such as data.prompt or data.input"
        )
