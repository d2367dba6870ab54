"""The helper process that plans recipes of a server's clients, for `turret.helper_process`.

It loads the base of a recipe as `turret plan` does. It opens no file of a tenant: `turret.workspace.data_reader` has
read the data. It downloads nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from turret.access import Access
from turret.data.example_store import load_dataset
from turret.errors import TurretError
from turret.helper_process import Answer
from turret.json_types import JsonObject
from turret.recipe import Recipe
from turret.workspace.child_process import parents_store, status_of
from turret.workspace.data_readers import OFFLINE


def helper(about: JsonObject) -> Answer:
    """What plans a recipe."""
    os.environ[OFFLINE] = "1"  # before the libraries of the Hub are loaded
    from turret.workspace import training

    store = parents_store(about["local"])

    def answer(asked: JsonObject) -> JsonObject:
        try:
            own, recipe = store.with_access(Access(asked["tenant"])), Recipe.from_toml(asked["recipe"])
            planned = training.plan(own, recipe, training.Callbacks(), load_dataset(Path(asked["data"])))
        except TurretError as error:
            return {"status": status_of(error), "text": str(error)}
        except MemoryError:
            return {"status": 1, "text": "the plan takes too much memory: choose a smaller base, or train elsewhere"}
        return {"status": 0, "planned": planned.as_json(), "toml": planned.recipe.to_toml()}

    return answer
