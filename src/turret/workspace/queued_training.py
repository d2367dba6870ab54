"""The process of one training from the queue: `python -P -m turret.workspace.queued_training REQUEST`.

It trains in an empty folder, which has only the data of the run, to which the data's path is relative. When the worker
ends, it writes a checkpoint and returns the run to the queue.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from turret.access import Access
from turret.errors import Interrupted, LeaseLost, StoreError, TurretError, one_line
from turret.recipe import Recipe
from turret.store import HeldRun, Store, TrainingQueue
from turret.store.queue import QueuedRun
from turret.train.curve import StepRecord
from turret.workspace import training
from turret.workspace.child_process import OUTAGE, Alive, parents_store, say_to_parent, status_of, stop_with_parent
from turret.workspace.progress import Say
from turret.workspace.queueing import bring_data, require_base

LINES = 20  # of the log for the steps of a training
WATCHED = 1.2  # times the silence that the worker allows: then this process ends itself, if its worker is gone


def main(request: str) -> int:
    """Carry out a request of the worker. Returns the exit status."""
    asked = json.loads(request)
    stop_with_parent(asked["stopping"])
    alive = Alive(WATCHED * asked["silent"] + asked["stopping"])
    taken = QueuedRun.of(asked["taken"])
    store = parents_store(asked["local"]).with_access(Access(taken.tenant))

    def train(recipe: Recipe, held: HeldRun) -> None:
        os.chdir(bring_data(store, recipe, Path(asked["folder"])))
        callbacks = callbacks_for(say_to_parent, lambda _: alive.sign())
        training.train(store, recipe, callbacks, fresh=False, held=held)

    ended = carry_out(store, taken, asked["bases"], train)
    if ended.text is not None:
        say_to_parent(ended.text)
    return ended.status


@dataclass(frozen=True)
class Ended:
    """How a try ended."""

    status: int  # 0, or that of the error
    text: str | None = None  # of the error


def carry_out(store: Store, taken: QueuedRun, bases: Sequence[str], train: Callable[[Recipe, HeldRun], None]) -> Ended:
    """Hold a run that the parent process has taken, train it, and record how the try ended.

    Args:
        bases: patterns of those of the Hub that recipes may name.
    """
    try:
        queue = TrainingQueue.of(store)
    except StoreError as error:
        return Ended(status_of(error), str(error))
    try:
        held = queue.adopt(taken)
        recipe = Recipe.from_toml(taken.recipe)
        require_base(recipe, bases)
        train(recipe, held)
    except (Interrupted, KeyboardInterrupt):
        with suppress(StoreError):  # then the worker records it
            queue.after(taken, None)
        return Ended(Interrupted.exit_status)
    except LeaseLost as error:
        return Ended(error.exit_status, str(error))
    except TurretError as error:
        status = status_of(error)
        with suppress(StoreError):
            queue.after(taken, str(error), again=status != error.exit_status, outage=status == OUTAGE)
        return Ended(status, str(error))
    except Exception as error:
        text = mistake_of_turret(error)
        with suppress(StoreError):
            queue.after(taken, text)
        return Ended(1, text)
    return Ended(0)


def mistake_of_turret(error: BaseException) -> str:
    """A line for the log of a run that ended by an error in the code. TURRET_DEBUG=1 prints where it is, on stderr."""
    if os.environ.get("TURRET_DEBUG") == "1":
        traceback.print_exception(error)
    return one_line(f"this is a bug in turret ({type(error).__name__}: {error}): please report it")


def callbacks_for(say: Say, sign: Callable[[StepRecord | None], None]) -> training.Callbacks:
    """What a training tells the worker, in lines for the log.

    Args:
        sign: called at each sign of life; with the record after a step.
    """

    def on_record(record: StepRecord) -> None:
        sign(record)
        if record.step % max(1, record.steps // LINES) == 0 or record.metrics is not None:
            metrics = "" if record.metrics is None else f", {record.split} {_shown(record.metrics)}"
            say(f"step {record.step} of {record.steps}, loss {record.loss:.4f}{metrics}")

    def on_stage(line: str) -> None:
        sign(None)
        say(line)

    return training.Callbacks(on_record, stage=on_stage, warning=say)


def _shown(metrics: dict[str, float]) -> str:
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
    return ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
