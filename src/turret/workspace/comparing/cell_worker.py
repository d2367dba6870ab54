"""The process of one cell, `python -P -m turret.workspace.comparing.cell_worker FOLDER`, or of many cells on one base.

It reads request.json in FOLDER, trains (or uses the run that an earlier process finished), measures the stored version,
and writes result.json. It is a child of `turret.workspace.child_process`. One training per process gives a correct peak
memory. Without FOLDER it is a kept child: it carries out one folder after another, and loads their base once.
"""

from __future__ import annotations

import json
import sys
import time
from functools import cache
from pathlib import Path

from filelock import FileLock

from turret import process
from turret.access import Access
from turret.compare.candidates import UNTRAINED
from turret.compare.report_text import seconds as span
from turret.errors import Interrupted, TurretError
from turret.json_types import JsonMapping, JsonObject
from turret.recipe import Recipe
from turret.store import Store
from turret.store.leases import Lease
from turret.train.curve import StepRecord
from turret.workspace import training
from turret.workspace.child_process import parents_store, requests, say_ended, say_to_parent, stop_with_parent
from turret.workspace.comparing import kept_files, measure
from turret.workspace.comparing.kept_files import KeptFiles
from turret.workspace.reading import read_dataset
from turret.workspace.resident import ALONE, OwnProcess, ResidentBases
from turret.workspace.results import Planned

WAIT = 120.0  # seconds in which an earlier process of this cell can write its checkpoint


def main(folder: str | None = None) -> int:
    """Carry out the request in a folder, or in those that the parent names. Returns the exit status."""
    if folder is not None:
        stop_with_parent()
        return carry_out(Path(folder), ALONE)
    place = ResidentBases(thread=None)
    for each in requests():
        status = carry_out(Path(each), place)
        if status == Interrupted.exit_status:
            return status
        process.release()
        say_ended(status)
    return 0


def carry_out(folder: Path, place: OwnProcess) -> int:
    """Carry out the request in a folder. Returns what a process of its own would exit with."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        with FileLock(folder / "lock", timeout=WAIT):
            if not (folder / "result.json").exists():
                files = _files(request)
                files.write(folder / "result.json", _result(folder, request, files, place))
    except Interrupted:
        return Interrupted.exit_status
    except TurretError as error:
        kept_files.write(folder / "failed.json", {"error": str(error), "kind": type(error).__name__})
        return error.exit_status
    return 0


def _files(request: JsonMapping) -> KeptFiles:
    store = _store(request["local"], request["tenant"])
    lease = request.get("lease")
    return KeptFiles(store, None if lease is None else Lease.of(lease))


@cache
def _store(local: str, tenant: str) -> Store:
    return parents_store(local).with_access(Access(tenant))


def _result(folder: Path, request: JsonMapping, files: KeptFiles, place: OwnProcess) -> JsonObject:
    started = time.perf_counter()
    recipe, store = Recipe.from_toml(request["recipe"]), files.store
    place.let_go({recipe.base})
    if request["kind"] in UNTRAINED:
        ready = training.prepare(store, recipe, training.Callbacks(stage=say_to_parent), place=place)
        result = measure.baseline(request["kind"], ready, say_to_parent)
    else:
        run = _finished(folder, store, recipe) or _trained(folder, files, recipe, request["comparison"], place)
        plan = kept_files.read(folder / "plan.json") or {}
        result = measure.version(store, recipe, run, plan, say_to_parent, place)
    return result | {"wall_seconds": time.perf_counter() - started, "resident": place.stays}


def _finished(folder: Path, store: Store, recipe: Recipe) -> JsonObject | None:
    """The run of an earlier process of this cell that ended after storing its version and before measuring it."""
    try:
        filled = (folder / "recipe.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    result = store.training_runs().finished(filled, read_dataset(store, recipe).digest) if store.exists() else None
    if result is None or result["version"] not in {
        str(version) for version in store.list(Recipe.from_toml(filled).name)
    }:
        return None
    return result


def _trained(folder: Path, files: KeptFiles, recipe: Recipe, comparison: str, place: OwnProcess) -> JsonObject:
    def on_plan(planned: Planned) -> None:
        files.write_text(folder / "recipe.toml", planned.recipe.without_trackers().to_toml())
        files.write(folder / "plan.json", planned.plan.to_json())

    seconds: list[float] = []  # of each step of this process

    def on_record(record: StepRecord) -> None:
        seconds.append(record.seconds)
        if record.step % max(1, record.steps // 50) == 0:
            left = span(sum(seconds) / len(seconds) * (record.steps - record.step))
            step = f"step {record.step} of {record.steps}"
            say_to_parent(f"{step}, loss {record.loss:.3f}, {left} left of this training")

    callbacks = training.Callbacks(on_record, on_plan, say_to_parent)
    return training.train(files.store, recipe, callbacks, fresh=False, comparison=comparison, place=place).as_json()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
