"""The process of one training from the queue: `python -P -m turret.workspace.queued_training REQUEST`.

It trains in an empty folder, which has only the data of the run, to which the data's path is relative. When the worker
ends, it writes a checkpoint and returns the run to the queue.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from turret.access import Access
from turret.disk import FAILING, NO_ROOM, errno_of
from turret.errors import DeviceError, HubError, Interrupted, LeaseLost, OutOfMemory, StoreError, TurretError
from turret.location import Location
from turret.recipe import Recipe
from turret.store import Store, TrainingQueue
from turret.store.queue import QueuedRun
from turret.train.curve import StepRecord
from turret.workspace import training
from turret.workspace.child_process import MACHINE, OUTAGE, Alive, say_to_parent, stop_with_parent
from turret.workspace.queueing import bring_data, require_base

LINES = 20  # of the log for the steps of a training
WATCHED = 1.2  # times the silence that the worker allows: then this process ends itself, if its worker is gone


def main(request: str) -> int:
    """Carry out a request of the worker. Returns the exit status."""
    asked = json.loads(request)
    stop_with_parent(asked["stopping"])
    alive = Alive(WATCHED * asked["silent"] + asked["stopping"])
    taken, local = QueuedRun.of(asked["taken"]), Path(asked["local"])
    location = Location.parse(os.environ["TURRET_STORE"])
    store = Store(replace(location, local=local) if location.catalog else local, Access(taken.tenant))
    try:
        queue = TrainingQueue.of(store)
    except StoreError as error:
        say_to_parent(str(error))
        return _status(error)
    try:
        held = queue.adopt(taken)
        recipe = Recipe.from_toml(taken.recipe)
        require_base(recipe, asked["bases"])
        os.chdir(bring_data(store, recipe, Path(asked["folder"])))
        training.train(store, recipe, _callbacks(alive), fresh=False, held=held)
    except (Interrupted, KeyboardInterrupt):
        with suppress(StoreError):  # then the worker records it
            queue.after(taken, None)
        return Interrupted.exit_status
    except LeaseLost as error:
        say_to_parent(str(error))
        return error.exit_status
    except TurretError as error:
        say_to_parent(str(error))
        status = _status(error)
        with suppress(StoreError):
            queue.after(taken, str(error), again=status != error.exit_status, outage=status == OUTAGE)
        return status
    return 0


def _status(error: TurretError) -> int:
    """The exit status for an error: that of a mistake, unless another try may succeed."""
    if isinstance(error, StoreError):
        return OUTAGE if error.outage else MACHINE
    cause = error.__cause__
    disk = isinstance(cause, Exception) and errno_of(cause) in (*NO_ROOM, *FAILING)
    return MACHINE if disk or isinstance(error, HubError | DeviceError | OutOfMemory) else error.exit_status


def _callbacks(alive: Alive) -> training.Callbacks:
    def on_record(record: StepRecord) -> None:
        alive.sign()
        if record.step % max(1, record.steps // LINES) == 0 or record.metrics is not None:
            metrics = "" if record.metrics is None else f", {record.split} {_shown(record.metrics)}"
            say_to_parent(f"step {record.step} of {record.steps}, loss {record.loss:.4f}{metrics}")

    def on_stage(line: str) -> None:
        alive.sign()
        say_to_parent(line)

    return training.Callbacks(on_record, stage=on_stage, warning=say_to_parent)


def _shown(metrics: dict[str, float]) -> str:
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
    return ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
