"""The helper process that reads the data of queued runs, for `turret.helper_process`. It loads no torch.

It alone opens files of tenants. What it read goes to the process that trains as lines of JSON in a file.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from turret.access import Access
from turret.data.example_store import write_dataset
from turret.errors import TurretError
from turret.helper_process import Answer
from turret.json_types import JsonObject
from turret.recipe import Recipe
from turret.workspace.child_process import parents_store, status_of
from turret.workspace.queueing import bring_data
from turret.workspace.reading import read_dataset

READ = "dataset.jsonl"  # in the folder of a question


def helper(about: JsonObject) -> Answer:
    """What reads the data of a run."""
    store = parents_store(about["local"])

    def answer(asked: JsonObject) -> JsonObject:
        folder = Path(asked["folder"])
        try:
            own, recipe = store.with_access(Access(asked["tenant"])), Recipe.from_toml(asked["recipe"])
            working = Path(tempfile.mkdtemp(prefix="data-", dir=folder))  # a reader that died has left its own
            os.chdir(bring_data(own, recipe, working))
            write_dataset(read_dataset(own, recipe), folder / READ)
        except TurretError as error:
            return {"status": status_of(error), "text": str(error)}
        except (MemoryError, OSError) as error:
            return {"status": 1, "text": f"the data cannot be read: {str(error) or 'it takes too much memory'}"}
        finally:
            os.chdir("/")
        return {"status": 0}

    return answer
