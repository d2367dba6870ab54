"""The process of one cell: `python -P -m turret.workspace.comparing.cell_worker FOLDER`.

It reads request.json in FOLDER, trains (or uses the run that an earlier process finished), measures the stored version,
and writes result.json. On stdout it reports its progress, one JSON object per line. When its parent process ends, it
writes a checkpoint and ends. One training per process gives a correct peak memory.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock

from turret.access import Access
from turret.compare.report_text import seconds as span
from turret.errors import Interrupted, TurretError
from turret.json_types import JsonMapping, JsonObject
from turret.recipe import Recipe
from turret.store import Store
from turret.train import StepRecord
from turret.workspace import training
from turret.workspace.comparing import measure, state
from turret.workspace.reading import read_dataset
from turret.workspace.results import Planned

WAIT = 120.0  # seconds in which an earlier process of this cell can write its checkpoint


def main(folder: Path) -> int:
    """Carry out the request in a folder. Returns the exit status."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    (folder / "failed.json").unlink(missing_ok=True)
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        with FileLock(folder / "lock", timeout=WAIT):
            if not (folder / "result.json").exists():
                state.write(folder / "result.json", _carry_out(folder, request))
    except Interrupted:
        return Interrupted.exit_status
    except TurretError as error:
        state.write(folder / "failed.json", {"error": str(error), "kind": type(error).__name__})
        return error.exit_status
    return 0


def _stop_with_parent() -> None:
    """Ask this process to stop when its parent has ended, which closes our stdin."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.read: at exit Python would wait for its lock and abort
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _carry_out(folder: Path, request: JsonMapping) -> JsonObject:
    started = time.perf_counter()
    recipe, store = Recipe.from_toml(request["recipe"]), Store(request["store"], Access(request["tenant"]))
    if request["kind"] == "base":
        result = measure.base(store, recipe, _say)
    else:
        run = _finished(folder, store, recipe) or _trained(folder, store, recipe)
        result = measure.version(store, recipe, run, state.read(folder / "plan.json") or {}, _say)
    result["wall_seconds"] = time.perf_counter() - started
    return result


def _finished(folder: Path, store: Store, recipe: Recipe) -> JsonObject | None:
    """The run of an earlier process of this cell that ended after storing its version and before measuring it."""
    try:
        filled = (folder / "recipe.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    result = store.finished_run(filled, read_dataset(recipe).digest)
    if result is None or result["version"] not in {
        str(version) for version in store.list(Recipe.from_toml(filled).name)
    }:
        return None
    return result


def _trained(folder: Path, store: Store, recipe: Recipe) -> JsonObject:
    def on_plan(planned: Planned) -> None:
        state.write_text(folder / "recipe.toml", planned.recipe.without_trackers().to_toml())
        state.write(folder / "plan.json", planned.plan.to_json())

    seconds: list[float] = []  # of each step of this process

    def on_record(record: StepRecord) -> None:
        seconds.append(record.seconds)
        if record.step % max(1, record.steps // 50) == 0:
            left = span(sum(seconds) / len(seconds) * (record.steps - record.step))
            _say(f"step {record.step} of {record.steps}, loss {record.loss:.3f}, {left} left of this training")

    return training.train(store, recipe, training.Callbacks(on_record, on_plan, _say), fresh=False).as_json()


def _say(line: str) -> None:
    print(json.dumps({"stage": line}), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
