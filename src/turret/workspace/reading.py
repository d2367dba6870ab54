"""Read the data of a training or of a stored version. Loads no torch, so a mistake in a table is reported quickly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turret.data import Dataset, Example, Input
from turret.data.table import ROLES
from turret.errors import RecipeError, one_line
from turret.json_types import JsonMapping, JsonObject
from turret.store import Version
from turret.tasks import schemas, stored_task, task_of
from turret.trackers.table import require_installed
from turret.workspace.progress import Say, silent

if TYPE_CHECKING:
    from turret.data.rows import Rows
    from turret.recipe import Data, Recipe

KEPT = (
    "separator",
    "normalize_labels",
    "header",
    "rename",
    "bad_lines",
)  # other keys that a version reads new tables with


@dataclass(frozen=True)
class LabelledData:
    """The examples that a version is measured on."""

    data: Data
    examples: Sequence[Example]
    places: Sequence[int]  # the line (of a text file) or the number of each one's row
    notes: Sequence[str]


def read_dataset(recipe: Recipe, say: Say = silent) -> Dataset:
    """The data set of a recipe. Raises DataError."""
    from turret.data.dataset import read

    say(f"reading {one_line(recipe.data.source, 100)}")
    return read(recipe.data, schemas(recipe.task), recipe.split_seed)


def read_before_torch(recipe: Recipe, say: Say) -> Dataset | None:
    """The data set, unless torchrun started several processes, of which the main one has to read first."""
    require_installed(recipe.train.trackers or ())
    return None if os.environ.get("WORLD_SIZE", "1") != "1" else read_dataset(recipe, say)


def with_base(recipe: Recipe, kind: str) -> tuple[Recipe, list[str]]:
    """The recipe with a base, and a note if it named none.

    Args:
        kind: of the task.
    """
    from turret.recipe.default_base import AUTO, default_base

    if recipe.base != AUTO:
        return recipe, []
    base, note = default_base(task_of(kind).generates)
    return recipe.model_copy(update={"base": base}), [note]


def read_labelled(version: Version, source: str, columns: JsonMapping) -> LabelledData:
    """The test examples of a source as a version reads them: with the columns and labels of its training data.

    Args:
        columns: keys of a recipe's `[data]`, which override the version's.
    """
    from turret.data.dataset import read_test

    spec = version.part("task")
    schema = stored_task(spec).schema(multi_label=bool(spec.get("multi_label")))
    trained = trained_on(version)
    data = _data(source, trained, columns)
    rows = read_test(data, schema, labels=tuple(spec.get("labels") or ()), trained=_roles(trained))
    return LabelledData(data, rows.examples, rows.places, rows.notes)


def read_texts(version: Version, source: str, columns: JsonMapping) -> list[Input]:
    """The inputs in a file: the lines of a .txt file, or a column of a table."""
    from turret.data.rows import read_inputs

    trained = trained_on(version)
    schema = stored_task(version.part("task")).schema()
    return read_inputs(_data(source, trained, columns), schema, trained=_roles(trained))


def read_rows(version: Version, source: str, columns: JsonMapping) -> Rows:
    """The rows of a file with all their cells, to be answered one after another."""
    from turret.data import rows

    trained = trained_on(version)
    schema = stored_task(version.part("task")).schema()
    return rows.read_rows(_data(source, trained, columns), schema, trained=_roles(trained))


def trained_on(version: Version) -> JsonObject:
    """The `[data]` of the recipe that made a version; empty for a version without a recipe, such as an imported one."""
    from turret.recipe import toml

    try:
        recipe = toml.loads(str(version.part("lineage").get("recipe") or ""))
    except ValueError:
        return {}
    data = recipe.get("data")
    return data if isinstance(data, dict) else {}


def _roles(trained: JsonMapping) -> dict[str, str]:
    return {role: str(trained[role]) for role in ROLES if trained.get(role) is not None}


def _data(source: str, trained: JsonMapping, columns: JsonMapping) -> Data:
    from turret.recipe import Data

    kept = {key: trained[key] for key in KEPT if key in trained}
    try:
        return Data.model_validate({"source": source, **kept, **columns})
    except RecipeError as error:
        raise RecipeError(f"the columns of {source[:60]!r}: {error}") from None
