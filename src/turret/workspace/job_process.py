"""The process of one job from the queue: `python -P -m turret.workspace.job_process REQUEST`.

It trains in an empty folder, which has only the data of the job, to which the data's path is relative. When the worker
ends, it writes a checkpoint and returns the job to the queue. One training in a process gives a correct peak memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from turret import adapters, bases
from turret.access import Access
from turret.adapters import packed
from turret.amounts import span
from turret.bases.base import share_weights
from turret.compare.design import UNTRAINED
from turret.data import Dataset
from turret.database import CELL, TRAINING
from turret.disk import make_folder
from turret.engine.core import Engine
from turret.errors import BaseModelError, OutOfMemory, PreflightRefused, StoreError, TurretError
from turret.json_types import JsonObject
from turret.methods import LoRA
from turret.recipe import Recipe
from turret.store import JobQueue, Store
from turret.store.jobs import CellSpec, Entry, Job
from turret.tasks.shapes import Metrics, number_in, number_of
from turret.train.batches import pass_tokens
from turret.train.curve import StepRecord
from turret.workspace import measure, training
from turret.workspace.cells import TRIAL, KeptFiles, read_json
from turret.workspace.child_process import (
    Alive,
    Ended,
    Failure,
    WorkerRequest,
    attempt_job,
    do_request,
)
from turret.workspace.data_readers import DataReaders
from turret.workspace.progress import Say
from turret.workspace.queue_worker import SILENT_SECONDS, Worker, WorkerLimits, can_share
from turret.workspace.queueing import bring_data, require_base
from turret.workspace.reading import read_dataset
from turret.workspace.resident import ALONE, OwnProcess, Room, Seat, ServingBase
from turret.workspace.results import Planned, RunResult

LINES = 50  # of the log for the steps of a training
WATCHED = 1.2  # times the silence that the worker allows: then this process ends itself, if its worker is gone
EARLIER_SECONDS = 120.0  # in which an earlier process of a cell can write its checkpoint


def main(request: str) -> None:
    """Carry out a request of the worker."""
    do_request(request, _do)


def _do(asked: WorkerRequest, store: Store, taken: Job, say: Say) -> Ended:
    alive = Alive(taken.id, WATCHED * asked["silent"] + asked["stopping"])
    callbacks = callbacks_for(say, lambda _: alive.sign())

    def read(recipe: Recipe) -> Dataset:
        if asked["folder"] is not None:
            os.chdir(bring_data(store, recipe, Path(asked["folder"])))
        return read_dataset(store, recipe, callbacks.stage)

    return carry_out(store, taken, asked["bases"], Trial(callbacks, read))


@dataclass(frozen=True)
class Trial:
    """Where and how a job is carried out.

    Args:
        read: reads the data of a recipe.
        place: where it computes.
        asked: whether it shall stop after the present step, with a checkpoint.
    """

    callbacks: training.Callbacks
    read: Callable[[Recipe], Dataset]
    place: OwnProcess = ALONE
    asked: Callable[[], bool] = lambda: False


def carry_out(store: Store, taken: Job, bases: Sequence[str], trial: Trial) -> Ended:
    """Hold a job that the parent process has taken, do it, and record how the try ended.

    Args:
        bases: patterns of those of the Hub that recipes may name.
    """

    def do(queue: JobQueue) -> None:
        held = queue.adopt_training(taken) if taken.kind == TRAINING else None
        if held is None:
            queue.adopt(taken)
        recipe = Recipe.from_toml(taken.recipe)
        require_base(recipe, bases)
        if held is None:
            _run_cell(store, taken, recipe, trial)
            queue.finish(taken)
            return
        data, place, asked = trial.read(recipe), trial.place, trial.asked
        training.train(store, recipe, trial.callbacks, data, fresh=False, held=held, place=place, asked=asked)

    def short(error: TurretError) -> bool:
        return taken.kind == CELL and trial.place.stays and isinstance(error, PreflightRefused | OutOfMemory)

    return attempt_job(store, taken, do, short)


def callbacks_for(say: Say, sign: Callable[[StepRecord | None], None]) -> training.Callbacks:
    """What a training tells the worker, in lines for the log.

    Args:
        sign: called at each sign of life; with the record after a step.
    """
    seconds: list[float] = []  # of each step of this process

    def on_record(record: StepRecord) -> None:
        sign(record)
        seconds.append(record.seconds)
        if record.step % max(1, record.steps // LINES) == 0 or record.metrics is not None:
            metrics = "" if record.metrics is None else f", {record.split} {_metrics_text(record.metrics)}"
            left = span(sum(seconds) / len(seconds) * (record.steps - record.step))
            say(f"step {record.step} of {record.steps}, loss {record.loss:.4f}{metrics}, {left} left")

    def on_stage(line: str) -> None:
        sign(None)
        say(line)

    return training.Callbacks(on_record, stage=on_stage, warning=say)


def _metrics_text(metrics: Metrics) -> str:
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
    return ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())


# --- cells ------------------------------------------------------------------------------------------------------------
# A cell trains, or uses the run that an earlier process finished, measures the stored version, and writes result.json.


def _run_cell(store: Store, taken: Job, recipe: Recipe, trial: Trial) -> None:
    assert taken.spec is not None
    assert "key" in taken.spec
    place = f"{taken.spec['study']}/cells/{taken.spec['key']}"
    folder, files = store.root / place, KeptFiles(store, taken.lease)
    make_folder(folder)
    try:
        with FileLock(folder / "lock", timeout=EARLIER_SECONDS):
            store.artifacts.bring(f"{place}/")
            if not (folder / "result.json").exists():
                files.write(folder / "result.json", _result_of(store, taken.spec, folder, recipe, files, trial))
    except Timeout:
        raise StoreError(f"another process of this machine runs the cell in {folder}: try again later") from None


def _result_of(
    store: Store, spec: CellSpec, folder: Path, recipe: Recipe, files: KeptFiles, trial: Trial
) -> JsonObject:
    started = time.perf_counter()
    source = spec["source"] or recipe.data.source
    data = trial.read(recipe.changed(data={"source": source}))
    place, stage, tenant = trial.place, trial.callbacks.stage, store.access.tenant
    if spec["kind"] == TRIAL:  # chosen on the validation split, so nothing of the test split is measured
        data = replace(data, test=())
        run = _finished_run(folder, store, recipe, data) or _train_cell(store, spec, folder, recipe, data, files, trial)
        result = {"version": run.version, "digest": run.digest, "run": run.run, "metrics": run.metrics}
    elif spec["kind"] in UNTRAINED:
        ready = training.prepare(store, recipe, training.Callbacks(stage=stage), data, place=place)
        result = place.run(lambda: measure.baseline(spec["kind"], ready, stage), tenant)
    else:
        run = _finished_run(folder, store, recipe, data) or _train_cell(store, spec, folder, recipe, data, files, trial)
        plan = read_json(folder / "plan.json") or {}
        result = place.run(lambda: measure.version(store, recipe, data, run, plan, stage, place), tenant)
    return result | {"wall_seconds": time.perf_counter() - started, "resident": place.stays}


def _finished_run(folder: Path, store: Store, recipe: Recipe, data: Dataset) -> RunResult | None:
    """The run of an earlier process of this cell that ended after storing its version and before measuring it."""
    try:
        filled = (folder / "recipe.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    result = store.training_runs().finished_result(filled, data.digest) if store.exists() else None
    stored = [] if result is None else map(str, store.list(Recipe.from_toml(filled).name))
    return RunResult(**result) if result is not None and result["version"] in stored else None


def _train_cell(
    store: Store, spec: CellSpec, folder: Path, recipe: Recipe, data: Dataset, files: KeptFiles, trial: Trial
) -> RunResult:
    def on_plan(planned: Planned) -> None:
        files.write_text(folder / "recipe.toml", planned.recipe.without_trackers().to_toml())
        files.write(folder / "plan.json", planned.plan.to_json())

    def on_record(record: StepRecord) -> None:
        trial.callbacks.record(record)
        if spec["kind"] == TRIAL and record.metrics is not None:
            known = (read_json(folder / "evaluations.json") or {"evaluations": []})["evaluations"]
            measured = number_in(record.metrics, spec["metric"])
            value = -number_of(record.metrics, "loss") if measured is None else measured
            new = [*(each for each in known if each[0] < record.step), [record.step, value]]
            files.write(folder / "evaluations.json", {"evaluations": new})

    callbacks = training.Callbacks(on_record, on_plan, trial.callbacks.stage)
    comparison, place = str(spec["comparison"]), trial.place
    return training.train(
        store, recipe, callbacks, data, fresh=False, comparison=comparison, place=place, asked=trial.asked
    )


# --- in the process that serves ---------------------------------------------------------------------------------------


TIMED_TOKENS = 256  # of the pass whose time tells how long others take
FEWEST_TOKENS = 64  # of a training pass


class ServingTrainer:
    """Trains runs in this process, on the bases of its engines.

    Args:
        engines: Each answers on one base.
        pass_seconds: Of the longest pass of a training, about: an answer that arrives waits for it.
    """

    def __init__(self, store: Store, engines: Sequence[Engine], pass_seconds: float) -> None:
        self._store, self._queue = store, JobQueue.of(store, make=True)
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
        shorter = recipe.changed(train={"micro_batch_tokens": most})
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
        trainer = ServingTrainer(store, engines, pass_seconds)

        def mine(entry: Entry) -> bool:
            return entry.kind == TRAINING and not entry.died_beside and trainer.serves(entry.recipe)

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
        model = share_weights(engine.base).model
        adapters.attach(model, LoRA(r=8))
        try:
            times = []
            for _ in range(3):
                started = time.perf_counter()
                read = packed.pooled_states(model, [ids], "last")
                torch.autograd.backward(read.float().square().mean())
                times.append(time.perf_counter() - started)
            return min(times)
        finally:
            adapters.detach(model)

    fitting = int(seconds / engine.run(once) * TIMED_TOKENS)
    return max(FEWEST_TOKENS, fitting // FEWEST_TOKENS * FEWEST_TOKENS)


if __name__ == "__main__":
    main(sys.argv[1])
