"""Claim: every fast path of training makes a step of a real job faster, or saves less memory for its backward pass.

Each path of `turret.ops.table.PATHS` is turned off and on in one process, on the same batches, in the order
on, off, off, on. One measurement is a block of steps with the path and a block without it. A path that a larger one
computes too is measured with the larger one off on both sides. Jobs are those of `train_speed.py`: LoRA of
all-MiniLM-L6 on short texts and on articles, and of SmolLM2-135M on headlines, in the base's own precision. The paths
of an engine are measured by `fast_paths_engine.py`.

- The ratio is the time without the path over the time with it: the median of all pairs, with a 95% interval made of two
  order statistics.
- Memory is what autograd saves for the backward pass of a batch, counted by `saved_tensors_hooks`, without weights.

    python benchmarks/fast_paths.py                    every path and job; about ten minutes
    python benchmarks/fast_paths.py --jobs short --paths flash gelu --pairs 4
    python benchmarks/fast_paths.py --report
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fast_paths_engine
import record
import train_sides as sides
from serve_sides import use_threads

NAME = "fast_paths"
CLAIM = "every fast path makes a training step faster or saves less memory for its backward pass"
STEPS = {"short": 8, "full": 2, "decoder-lora": 1}  # of a block
WARM = 2  # blocks of each side before the first one that counts
SMALLEST = 0.05  # share of the saved memory that is named
# Paths of `fast_paths_engine.py` by their names in PATHS.
ENGINE = {
    "kernels": "all kernels",
    "layer": "layer",
    "layer_calls": "layers in one call",
    "frozen_linear": "few-token products",
    "cached_attention": "step attention",
}
LEARNING_RATE = 1e-4


def main() -> None:
    options = _options()
    if not options.report:
        use_threads(options.threads)
        with tempfile.TemporaryDirectory() as folder:
            for job in options.jobs:
                measure(job, options, Path(folder))
    print(report(kept()))


def measure(job: str, options: argparse.Namespace, folder: Path) -> None:
    """One run is kept for each path of a job."""
    from turret.ops.table import DECODER, ENCODER, PATHS, without

    kind = ENCODER if sides.JOBS[job].kind == "classify" else DECODER
    names = [name for name, path in PATHS.items() if path.trains and kind in path.bases]
    with _training(job, options, folder) as (dtype, block, saved):
        for name in (each for each in options.paths or names if each in names):
            larger = PATHS[name].part_of
            with_it, alone = lambda larger=larger: without(*larger), lambda name=name: without(name)
            pairs = in_turns(block, with_it, alone, options.pairs)
            memory = [saved(way) for way in (with_it, alone)]
            run = {
                "path": name, "settings": {
                    "job": job, "dtype": dtype, "batch": sides.hf.BATCH, "steps": STEPS[job], "pairs": options.pairs,
                    "threads": options.threads, "off on both sides": list(larger),
                },
                "seconds": [[round(a, 5), round(b, 5)] for a, b in pairs],  # with the path, without it
                "saved_bytes": memory, "machine": record.machine(options.threads),
            }  # fmt: skip
            record.keep(NAME, CLAIM, run)
            print(f"{job}, {name}: {spread(run)}", file=sys.stderr, flush=True)


def in_turns(
    block: Callable[[], float], with_it: Callable[[], Any], without_it: Callable[[], Any], pairs: int
) -> list[tuple[float, float]]:
    """(seconds with the path, seconds without it) of every pair, in the order A B, B A, A B, ..."""

    def timed(way: Callable[[], Any]) -> float:
        with way():
            return block()

    for way in [with_it, without_it] * WARM:
        timed(way)
    found = []
    for pair in range(pairs):
        order = [with_it, without_it] if pair % 2 == 0 else [without_it, with_it]
        seconds = [timed(way) for way in order]
        found.append((seconds[0], seconds[1]) if pair % 2 == 0 else (seconds[1], seconds[0]))
    return found


@contextmanager
def _training(
    job: str, options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Callable[[], float], Callable[[Callable[[], Any]], int]]]:
    """A training of the job that has begun: its dtype, a block of its steps, and the bytes that a step saves."""
    import torch

    from turret import adapters, process
    from turret.data.dataset import read_dataset
    from turret.engine import OptimStep
    from turret.tasks import make_task, schemas
    from turret.train import fill_recipe
    from turret.train.batches import splits_of
    from turret.train.loop import TrainingRun
    from turret.train.losses import loss_of

    errand = sides.Errand(
        job=job, side=sides.TURRET, source=_source(job, folder), seed=options.seed, steps=STEPS[job],
        lr=LEARNING_RATE, threads=options.threads, train=STEPS[job] * sides.hf.BATCH, test=8,
    )  # fmt: skip
    recipe = errand.recipe
    dataset = read_dataset(recipe.data, schemas(recipe.task), recipe.seed)
    base = sides._base(recipe, dataset)
    task = make_task(recipe.task, dataset, base.tokenizer, base.family.kind)
    recipe = fill_recipe(recipe, base, task.kind, len(splits_of(recipe, dataset).train))
    run = TrainingRun(recipe, base, task, dataset, None)
    batches = [batch for _, batch in run.remaining()]

    def step(batch: Any) -> None:
        run.slot.train_step(batch, OptimStep(LEARNING_RATE, clip=recipe.train.gradient_clip))

    def block() -> float:
        began = time.perf_counter()
        for batch in batches:
            step(batch)
        return time.perf_counter() - began

    def saved(way: Callable[[], Any]) -> int:
        weights = {each.untyped_storage().data_ptr() for each in base.model.parameters()}
        found: dict[int, int] = {}

        def pack(x: Any) -> Any:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return x

        with way(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss_of(base.model, task, batches[0])
        return sum(found.values())

    try:
        with process.keep_freed():
            yield str(base.dtype).removeprefix("torch."), block, saved
    finally:
        adapters.detach(base.model)


def _source(job: str, folder: Path) -> str:
    if not sides.JOBS[job].sentences:
        return sides.JOBS[job].source
    path = folder / "sentences.jsonl"
    if not path.exists():
        sides.sentences(path)
    return str(path)


# --- what the kept runs say ------------------------------------------------------------------------------------------


def kept() -> list[dict[str, Any]]:
    """The newest run of each path and job on each processor."""
    return record.newest(record.load(NAME), lambda run: (run["path"], run["settings"]["job"]))


def spread(run: Mapping[str, Any]) -> str:
    """The time without the path over the time with it."""
    with_it, without = zip(*run["seconds"], strict=True)
    return record.shown(record.ratio(without, with_it))


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table a processor and job."""
    tables = []
    for place in dict.fromkeys((run["machine"]["device"], run["settings"]["job"]) for run in runs):
        rows = []
        for run in runs:
            if (run["machine"]["device"], run["settings"]["job"]) != place:
                continue
            per_step = [
                1000 * statistics.median(side) / run["settings"]["steps"] for side in zip(*run["seconds"], strict=True)
            ]
            megabytes = [each / 1e6 for each in run["saved_bytes"]]
            rows.append([
                run["path"], spread(run), *(f"{each:.1f}" for each in per_step), *(f"{each:.1f}" for each in megabytes),
                ", ".join(run["settings"]["off on both sides"]),
            ])  # fmt: skip
        header = ["path", "faster", "ms a step", "without", "MB saved", "without", "off on both sides"]
        tables.append(f"**{place[1]}** ({place[0]})\n\n{record.table(header, rows)}")
    return "\n\n".join(tables)


def figures(machine: Callable[[Mapping[str, Any]], str]) -> str:
    """Every fast path with what it buys on the newest processor. machine: names the processor of a run."""
    from turret.ops.table import PATHS

    runs, served = kept(), record.newest(record.load(fast_paths_engine.NAME), lambda run: repr(run["settings"]))
    newest = max([*runs, *served], key=lambda run: run["machine"]["at"], default=None)
    device = newest and newest["machine"]["device"]
    rows = []
    for name, path in PATHS.items():
        own = [run for run in runs if run["path"] == name and run["machine"]["device"] == device]
        own.sort(key=lambda run: list(STEPS).index(run["settings"]["job"]))
        buys = [f"{run['settings']['job']} {spread(run)}{_memory(run)}" for run in own]
        own = [run for run in served if run["settings"]["path"] == ENGINE.get(name)]
        buys += [_served(run) for run in own if run["machine"]["device"] == device]
        cells = path.computes, f"`{path.module}`", path.reference, path.taken, "; ".join(buys) or "not measured"
        rows.append([f"`{name}`", *cells])
    header = ["path", "computes", "module", "reference", "taken when", "buys"]
    where = "" if newest is None else f"On {machine(newest)}, {newest['machine']['threads']} threads:\n\n"
    return where + record.table(header, rows)


def _memory(run: Mapping[str, Any]) -> str:
    with_it, without = run["saved_bytes"]
    return f", saves {without / with_it:.1f}x less" if without > (1 + SMALLEST) * with_it else ""


def _served(run: Mapping[str, Any]) -> str:
    """A run of `fast_paths_engine.py`, in the same form."""
    own, seconds = run["settings"], run["seconds"]
    return f"{own['job']} ({own['dtype']}) {record.shown(record.ratio(seconds['without'], seconds['with']))}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--paths", nargs="+", help="instead of all that the job's base has")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
