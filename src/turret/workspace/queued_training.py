"""The process of one training from the queue: `python -P -m turret.workspace.queued_training REQUEST`.

It trains in the folder with the data of queued trainings, to which the data's path is relative. When the worker ends,
it writes a checkpoint and returns the run to the queue.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from turret.access import Access
from turret.errors import DeviceError, HubError, Interrupted, LeaseLost, OutOfMemory, StoreError, TurretError
from turret.location import Location
from turret.recipe import Recipe
from turret.store import Store, TrainingQueue
from turret.store.queue import QueuedRun
from turret.train import StepRecord
from turret.workspace import training
from turret.workspace.child_process import say_to_parent, stop_with_parent
from turret.workspace.queueing import bring_data

AGAIN = (StoreError, HubError, DeviceError, OutOfMemory)  # another try, or another machine, may succeed
LINES = 20  # of the log for the steps of a training


def main(request: str) -> int:
    """Carry out a request of the worker. Returns the exit status."""
    stop_with_parent()
    asked = json.loads(request)
    taken, local = QueuedRun.of(asked["taken"]), Path(asked["local"])
    location = Location.parse(os.environ["TURRET_STORE"])
    store = Store(replace(location, local=local) if location.catalog else local, Access(taken.tenant))
    queue = TrainingQueue.of(store)
    try:
        held = queue.adopt(taken)
        recipe = Recipe.from_toml(taken.recipe)
        os.chdir(bring_data(store, recipe))
        training.train(store, recipe, _callbacks(), fresh=False, held=held)
    except (Interrupted, KeyboardInterrupt):
        queue.after(taken, None)
        return Interrupted.exit_status
    except LeaseLost as error:
        say_to_parent(str(error))
        return error.exit_status
    except TurretError as error:
        say_to_parent(str(error))
        with suppress(LeaseLost):
            queue.after(taken, str(error), again=isinstance(error, AGAIN))
        return error.exit_status
    return 0


def _callbacks() -> training.Callbacks:
    def on_record(record: StepRecord) -> None:
        if record.step % max(1, record.steps // LINES) == 0 or record.metrics is not None:
            metrics = "" if record.metrics is None else f", {record.split} {_shown(record.metrics)}"
            say_to_parent(f"step {record.step} of {record.steps}, loss {record.loss:.4f}{metrics}")

    return training.Callbacks(on_record, stage=say_to_parent, warning=say_to_parent)


def _shown(metrics: dict[str, float]) -> str:
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
    return ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
