"""The process of one job from the queue: `python -P -m turret.workspace.job_process REQUEST`.

It trains in an empty folder, which has only the data of the job, to which the data's path is relative. When the worker
ends, it writes a checkpoint and returns the job to the queue. One training in a process gives a correct peak memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from turret.access import Access
from turret.compare.candidates import UNTRAINED
from turret.compare.report_text import seconds as span
from turret.data import Dataset
from turret.database import CELL
from turret.disk import make_folder
from turret.errors import OutOfMemory, PreflightRefused, StoreError, TurretError
from turret.json_types import JsonObject
from turret.recipe import Recipe
from turret.store import JobQueue, Store
from turret.store.jobs import CellSpec, Job
from turret.store.runs import RunOutcome
from turret.tasks.shapes import Metrics, number_in, number_of
from turret.train.curve import StepRecord
from turret.workspace import training
from turret.workspace.child_process import (
    Alive,
    Ended,
    attempt,
    parents_store,
    say_to_parent,
    status_of,
    stop_with_parent,
)
from turret.workspace.comparing import kept_files, measure
from turret.workspace.comparing.kept_files import TRIAL, KeptFiles
from turret.workspace.progress import Say
from turret.workspace.queueing import bring_data, require_base
from turret.workspace.reading import read_dataset
from turret.workspace.resident import ALONE, OwnProcess
from turret.workspace.results import Planned

LINES = 50  # of the log for the steps of a training
WATCHED = 1.2  # times the silence that the worker allows: then this process ends itself, if its worker is gone
EARLIER_SECONDS = 120.0  # in which an earlier process of a cell can write its checkpoint


def main(request: str) -> int:
    """Carry out a request of the worker. Returns the exit status."""
    asked = json.loads(request)
    stop_with_parent(asked["stopping"])
    alive = Alive(WATCHED * asked["silent"] + asked["stopping"])
    taken = Job.of(asked["taken"])
    store = parents_store(asked["local"]).with_access(Access(taken.tenant))
    callbacks = callbacks_for(say_to_parent, lambda _: alive.sign())

    def read(recipe: Recipe) -> Dataset:
        if asked["folder"] is not None:
            os.chdir(bring_data(store, recipe, Path(asked["folder"])))
        return read_dataset(store, recipe, callbacks.stage)

    ended = carry_out(store, taken, asked["bases"], Trial(callbacks, read))
    if ended.text is not None:
        say_to_parent(ended.text)
    return ended.status


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
    try:
        queue = JobQueue.of(store)
    except StoreError as error:
        return Ended(status_of(error), str(error))

    def do() -> None:
        if taken.kind == CELL:
            queue.adopt(taken)
            recipe = Recipe.from_toml(taken.recipe)
            require_base(recipe, bases)
            _run_cell(store, taken, recipe, trial)
            queue.finish(taken)
        else:
            held = queue.adopt_training(taken)
            recipe = Recipe.from_toml(taken.recipe)
            require_base(recipe, bases)
            data, place, asked = trial.read(recipe), trial.place, trial.asked
            training.train(store, recipe, trial.callbacks, data, fresh=False, held=held, place=place, asked=asked)

    def short(error: TurretError) -> bool:
        return taken.kind == CELL and trial.place.stays and isinstance(error, PreflightRefused | OutOfMemory)

    return attempt(queue, taken, do, short)


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
            metrics = "" if record.metrics is None else f", {record.split} {_shown(record.metrics)}"
            left = span(sum(seconds) / len(seconds) * (record.steps - record.step))
            say(f"step {record.step} of {record.steps}, loss {record.loss:.4f}{metrics}, {left} left")

    def on_stage(line: str) -> None:
        sign(None)
        say(line)

    return training.Callbacks(on_record, stage=on_stage, warning=say)


def _shown(metrics: Metrics) -> str:
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
    data = trial.read(recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})}))
    place, stage, tenant = trial.place, trial.callbacks.stage, store.access.tenant
    if spec["kind"] == TRIAL:  # chosen on the validation split, so nothing of the test split is measured
        data = replace(data, test=())
        run = _finished(folder, store, recipe, data) or _trained(store, spec, folder, recipe, data, files, trial)
        result: JsonObject = {
            "version": run["version"],
            "digest": run["digest"],
            "run": run["run"],
            "metrics": run["metrics"],
        }
    elif spec["kind"] in UNTRAINED:
        ready = training.prepare(store, recipe, training.Callbacks(stage=stage), data, place=place)
        result = place.run(lambda: measure.baseline(spec["kind"], ready, stage), tenant)
    else:
        run = _finished(folder, store, recipe, data) or _trained(store, spec, folder, recipe, data, files, trial)
        plan = kept_files.read(folder / "plan.json") or {}
        result = place.run(lambda: measure.version(store, recipe, data, run, plan, stage, place), tenant)
    return result | {"wall_seconds": time.perf_counter() - started, "resident": place.stays}


def _finished(folder: Path, store: Store, recipe: Recipe, data: Dataset) -> RunOutcome | None:
    """The run of an earlier process of this cell that ended after storing its version and before measuring it."""
    try:
        filled = (folder / "recipe.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    result = store.training_runs().finished(filled, data.digest) if store.exists() else None
    if result is None or result["version"] not in {
        str(version) for version in store.list(Recipe.from_toml(filled).name)
    }:
        return None
    return result


def _trained(
    store: Store, spec: CellSpec, folder: Path, recipe: Recipe, data: Dataset, files: KeptFiles, trial: Trial
) -> RunOutcome:
    def on_plan(planned: Planned) -> None:
        files.write_text(folder / "recipe.toml", planned.recipe.without_trackers().to_toml())
        files.write(folder / "plan.json", planned.plan.to_json())

    def on_record(record: StepRecord) -> None:
        trial.callbacks.record(record)
        if spec["kind"] == TRIAL and record.metrics is not None:
            known = (kept_files.read(folder / "evaluations.json") or {"evaluations": []})["evaluations"]
            measured = number_in(record.metrics, spec["metric"])
            value = -number_of(record.metrics, "loss") if measured is None else measured
            new = [*(each for each in known if each[0] < record.step), [record.step, value]]
            files.write(folder / "evaluations.json", {"evaluations": new})

    callbacks = training.Callbacks(on_record, on_plan, trial.callbacks.stage)
    comparison, place = str(spec["comparison"]), trial.place
    result = training.train(
        store, recipe, callbacks, data, fresh=False, comparison=comparison, place=place, asked=trial.asked
    )
    return result.as_json()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
