"""The process of one cell: `python -P -m turret.workspace.comparing.cell_worker FOLDER`.

Reads request.json in FOLDER, trains (or takes the run that an earlier process finished), measures what was stored, and
writes result.json. On stdout it says how far it is, a JSON object a line. It ends, with a checkpoint, when whoever
started it is gone. Its peak memory is its own, because nothing else ran in it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from turret.compare.report_text import seconds as span
from turret.errors import Interrupted, TurretError
from turret.recipe import Recipe
from turret.store import Store
from turret.workspace import training
from turret.workspace.comparing import measure, state

WAIT = 120.0  # seconds for an earlier process of this cell to write its checkpoint


def main(folder: Path) -> int:
    """Carry out the request in a folder; returns the exit status."""
    threading.Thread(target=_follow_the_starter, daemon=True).start()
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


def _follow_the_starter() -> None:
    """Ask this process to stop once the one that started it is gone: its end of our stdin closes."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin: at exit Python would wait for its lock, and abort
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _carry_out(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    recipe, store = Recipe.from_toml(request["recipe"]), Store(request["store"])
    if request["kind"] == "base":
        found = measure.base(store, recipe, _say)
    else:
        result = _finished(folder, store, recipe) or _trained(folder, store, recipe)
        found = measure.version(store, recipe, result, state.read(folder / "plan.json") or {}, _say)
    found["wall_seconds"] = time.perf_counter() - started
    return found


def _finished(folder: Path, store: Store, recipe: Recipe) -> dict[str, Any] | None:
    """What an earlier process of this cell stored before it could measure it."""
    try:
        filled = (folder / "recipe.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    result = store.finished_run(filled, measure.data_of(recipe).digest)
    if result is None or result["version"] not in {
        str(version) for version in store.list(Recipe.from_toml(filled).name)
    }:
        return None
    return result


def _trained(folder: Path, store: Store, recipe: Recipe) -> dict[str, Any]:
    def planned(made: Any) -> None:
        state.write_text(folder / "recipe.toml", made.recipe.to_toml())
        state.write(folder / "plan.json", made.plan.to_json())

    spent = [0.0, 0]  # seconds and steps of this process

    def record(step: Any) -> None:
        spent[0], spent[1] = spent[0] + step.seconds, spent[1] + 1
        if step.step % max(1, step.steps // 50) == 0:
            left = span(spent[0] / spent[1] * (step.steps - step.step))
            _say(f"step {step.step} of {step.steps}, loss {step.loss:.3f}, {left} left of this training")

    watching = training.Watching(record, planned, _say)
    return training.train(store, recipe, watching, fresh=False).as_json()


def _say(words: str) -> None:
    print(json.dumps({"stage": words}), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
