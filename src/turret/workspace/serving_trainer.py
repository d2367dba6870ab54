"""Trains queued runs on the bases that serve: `turret serve --train`. Their passes take turns with those of answers."""

from __future__ import annotations

import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from turret import adapters, bases
from turret.access import Access
from turret.adapters import packed
from turret.bases.shared import share
from turret.data import Dataset
from turret.database import TRAINING
from turret.engine.core import Engine
from turret.errors import BaseModelError, StoreError, TurretError
from turret.methods import LoRA
from turret.recipe import Recipe
from turret.store import JobQueue, Store
from turret.store.jobs import Entry, Job
from turret.train.batches import pass_tokens
from turret.workspace.child_process import Failure
from turret.workspace.data_readers import DataReaders
from turret.workspace.job_process import Trial, callbacks_for, carry_out
from turret.workspace.progress import Say
from turret.workspace.queue_worker import SILENT_SECONDS, Worker, WorkerLimits, can_share
from turret.workspace.resident import Room, Seat, ServingBase

TIMED_TOKENS = 256  # of the pass whose time tells how long others take
FEWEST_TOKENS = 64  # of a training pass


class ServingTrainer:
    """Trains runs in this process, on the bases of its engines.

    Args:
        engines: Each answers on one base.
        pass_seconds: Of the longest pass of a training, about: an answer that arrives waits for it.
    """

    def __init__(self, store: Store, queue: JobQueue, engines: Sequence[Engine], pass_seconds: float) -> None:
        self._store, self._queue = store, queue
        self._places = [ServingBase(each) for each in engines]
        self._most_tokens = {id(each): _most_tokens(each.engine, pass_seconds) for each in self._places}
        self._folder = tempfile.TemporaryDirectory(prefix="turret-")
        self._readers = DataReaders(store, SILENT_SECONDS, folder=Path(self._folder.name))
        self._room = Room()

    def run(self, taken: Job, tell: Say, stop: Callable[[], bool]) -> Failure | None:
        """Train a run. Returns why it failed; None if it succeeded or was told to stop."""
        self._queue.set_beside([taken.id])  # if this process dies, the run is not to blame
        place = self._place_of(taken.recipe)
        if place is None:
            return Failure("its base does not serve here any more: submit it again for another worker")
        taken = self._with_short_passes(taken, place)
        store = self._store.with_access(Access(taken.tenant))
        seat = Seat(place, self._room, lambda: (), stop)

        callbacks = callbacks_for(tell, lambda record: None if record is None else seat.settle())

        def read(recipe: Recipe) -> Dataset:
            callbacks.stage(f"training beside the answers of {place.engine.base.id}")
            return self._readers.read(taken, stop)

        with self._room.taken_by(seat):
            ended = carry_out(store, taken, ("*",), Trial(callbacks, read, seat, stop))
        if ended.text is not None:
            tell(ended.text)
        return None if ended.status == 0 or stop() else Failure(ended.text or "it was interrupted", ended.status)

    def serves(self, recipe: str) -> bool:
        """Whether a recipe (TOML) can train here."""
        return can_share(recipe) and self._place_of(recipe) is not None

    def close(self) -> None:
        """End the readers and remove the files of this process; the runs have ended."""
        self._readers.close()
        self._folder.cleanup()

    def _place_of(self, recipe: str) -> ServingBase | None:
        try:
            wanted = bases.resolve(str(tomllib.loads(recipe)["base"])).folder
        except (BaseModelError, KeyError):
            return None
        return next((each for each in self._places if each.engine.base.folder == wanted), None)

    def _with_short_passes(self, taken: Job, place: ServingBase) -> Job:
        """The run with passes that are short enough, so that every worker that takes it over computes the same."""
        recipe = Recipe.from_toml(taken.recipe)
        usual = pass_tokens(recipe.train, place.engine.base.model.config)
        most = min(usual, self._most_tokens[id(place)])
        if most == usual:
            return taken
        shorter = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_tokens": most})})
        self._queue.set_recipe(taken, shorter.to_toml())
        return replace(taken, recipe=shorter.to_toml())


class TrainingWhileServing:
    """A worker in the process of a server. A context manager.

    Args:
        engines: Of the server.
        slots: Trainings at once.
        pass_seconds: Of the longest pass of a training.
        say: Gets a line for the log.
    """

    def __init__(self, store: Store, engines: Sequence[Engine], *, slots: int, pass_seconds: float, say: Say) -> None:
        trainers: list[ServingTrainer] = []

        def trainer(queue: JobQueue, _: threading.Event) -> ServingTrainer:
            trainers.append(ServingTrainer(store, queue, engines, pass_seconds))
            return trainers[0]

        def mine(entry: Entry) -> bool:
            return entry.kind == TRAINING and not entry.died_beside and trainers[0].serves(entry.recipe)

        self._worker = Worker(store, say, slots, WorkerLimits(), trainer, mine)
        self._say = say
        self._thread = threading.Thread(target=self._work, name="turret-trainings", daemon=True)

    def _work(self) -> None:
        while True:
            try:
                self._worker.work(until_empty=False)
            except StoreError as error:
                self._say(f"{error}; trying again")
                time.sleep(1.0)
            except TurretError:  # it was told to stop
                return

    def __enter__(self) -> TrainingWhileServing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Return all trainings to the queue, with a checkpoint."""
        self._worker.ask_to_stop()
        self._thread.join()  # first, so that it begins no training that nobody waits for
        self._worker.stop()


def _most_tokens(engine: Engine, seconds: float) -> int:
    """The tokens of a training pass that takes so long, measured on one with LoRA."""
    ids = torch.arange(TIMED_TOKENS) % 100 + 5

    def once() -> float:
        model = share(engine.base).model
        adapters.attach(model, LoRA(r=8))
        try:
            times = []
            for _ in range(3):
                started = time.perf_counter()
                read = packed.pooled(model, [ids], "last")
                torch.autograd.backward(read.float().square().mean())
                times.append(time.perf_counter() - started)
            return min(times)
        finally:
            adapters.detach(model)

    fitting = int(seconds / engine.run(once) * TIMED_TOKENS)
    return max(FEWEST_TOKENS, fitting // FEWEST_TOKENS * FEWEST_TOKENS)
