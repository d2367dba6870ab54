"""The process of one cell: `python -P -m turret.workspace.comparing.cell_worker FOLDER`.

It reads request.json in FOLDER, trains (or uses the run that an earlier process finished), measures the stored version,
and writes result.json. It is a child of `turret.workspace.child_process`. One training per process gives a correct peak
memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from turret.access import Access
from turret.compare.candidates import UNTRAINED
from turret.compare.report_text import seconds as span
from turret.errors import Interrupted, TurretError
from turret.json_types import JsonMapping, JsonObject
from turret.location import Location
from turret.recipe import Recipe
from turret.store import Store
from turret.store.leases import Lease
from turret.train.curve import StepRecord
from turret.workspace import training
from turret.workspace.child_process import say_to_parent, stop_with_parent
from turret.workspace.comparing import kept_files, measure
from turret.workspace.comparing.kept_files import KeptFiles
from turret.workspace.reading import read_dataset
from turret.workspace.results import Planned

WAIT = 120.0  # seconds in which an earlier process of this cell can write its checkpoint


def main(folder: Path) -> int:
    """Carry out the request in a folder. Returns the exit status."""
    stop_with_parent()
    (folder / "failed.json").unlink(missing_ok=True)
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        with FileLock(folder / "lock", timeout=WAIT):
            if not (folder / "result.json").exists():
                files = _files(request)
                files.write(folder / "result.json", _carry_out(folder, request, files))
    except Interrupted:
        return Interrupted.exit_status
    except TurretError as error:
        kept_files.write(folder / "failed.json", {"error": str(error), "kind": type(error).__name__})
        return error.exit_status
    return 0


def _files(request: JsonMapping) -> KeptFiles:
    location = Location.parse(os.environ["TURRET_STORE"])
    where = replace(location, local=Path(request["local"])) if location.catalog else request["local"]
    store = Store(where, Access(request["tenant"]))
    lease = request.get("lease")
    return KeptFiles(store, None if lease is None else Lease.of(lease))


def _carry_out(folder: Path, request: JsonMapping, files: KeptFiles) -> JsonObject:
    started = time.perf_counter()
    recipe, store = Recipe.from_toml(request["recipe"]), files.store
    if request["kind"] in UNTRAINED:
        ready = training.prepare(store, recipe, training.Callbacks(stage=say_to_parent))
        result = measure.baseline(request["kind"], ready, say_to_parent)
    else:
        run = _finished(folder, store, recipe) or _trained(folder, files, recipe, request["comparison"])
        result = measure.version(store, recipe, run, kept_files.read(folder / "plan.json") or {}, say_to_parent)
    result["wall_seconds"] = time.perf_counter() - started
    return result


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


def _trained(folder: Path, files: KeptFiles, recipe: Recipe, comparison: str) -> JsonObject:
    def on_plan(planned: Planned) -> None:
        files.write_text(folder / "recipe.toml", planned.recipe.without_trackers().to_toml())
        files.write(folder / "plan.json", planned.plan.to_json())

    seconds: list[float] = []  # of each step of this process

    def on_record(record: StepRecord) -> None:
        seconds.append(record.seconds)
        if record.step % max(1, record.steps // 50) == 0:
            left = span(sum(seconds) / len(seconds) * (record.steps - record.step))
            place = f"step {record.step} of {record.steps}"
            say_to_parent(f"{place}, loss {record.loss:.3f}, {left} left of this training")

    callbacks = training.Callbacks(on_record, on_plan, say_to_parent)
    return training.train(files.store, recipe, callbacks, fresh=False, comparison=comparison).as_json()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
