"""The helper process that reads the data of tenants, for `turret.process`. It loads no torch.

It alone opens files of tenants: the data of queued runs, and files that clients of a server send. It writes the data of
a run as lines of JSON into a file, which the process that trains reads. `data_readers` asks it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from turret.access import Access
from turret.data.examples import write_dataset
from turret.errors import TurretError
from turret.recipe import Recipe
from turret.store import Store
from turret.workspace.child_process import parents_store, status_of
from turret.workspace.data_readers import OFFLINE, READ, AboutReader, LookQuestion, ReaderReply, ReadQuestion
from turret.workspace.drafting import inspect, sample
from turret.workspace.queueing import bring_data
from turret.workspace.reading import read_dataset


def helper(about: AboutReader) -> Callable[[ReadQuestion | LookQuestion], ReaderReply]:
    """What reads the data of a run, or looks at a table."""
    store = parents_store(about["local"])
    if about["offline"]:
        os.environ[OFFLINE] = "1"

    def answer(asked: ReadQuestion | LookQuestion) -> ReaderReply:
        try:
            if "source" in asked:
                os.chdir(asked["folder"])
                most = asked["rows"]
                found = asdict(sample(asked["source"], most)) if most else None
                return {"status": 0, "found": found or inspect(asked["source"], asked["settings"]).as_json()}
            _read(store.with_access(Access(asked["tenant"])), asked)
        except TurretError as error:
            return {"status": status_of(error), "text": str(error)}
        except (MemoryError, OSError) as error:
            return {"status": 1, "text": f"the data cannot be read: {str(error) or 'it takes too much memory'}"}
        finally:
            os.chdir("/")
        return {"status": 0}

    return answer


def _read(store: Store, asked: ReadQuestion) -> None:
    folder, recipe = Path(asked["folder"]), Recipe.from_toml(asked["recipe"])
    working = Path(tempfile.mkdtemp(prefix="data-", dir=folder))  # a reader that died has left its own
    os.chdir(folder if asked["sent"] else bring_data(store, recipe, working))
    write_dataset(read_dataset(store, recipe), folder / READ)
