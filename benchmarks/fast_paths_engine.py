"""Claim: each fast path of the engine makes some whole job at least 5% faster.

A fast path is code that computes what simpler code computes too. For each one, a job runs with it and without it, in
turns, in one process and on one engine. The ratio is the seconds without over the seconds with it: the geometric mean
over the pairs, with Student's 95% interval of the logarithms. `PATHS` lists the paths, how each is switched off, and
what is off on both sides: a path that a larger one contains is measured without the larger one.

Jobs, with a LoRA r=8 on all linear layers for each text or prompt: 32 texts of 64 to 256 tokens in one batch and 16
texts of 12 tokens one after another (all-MiniLM-L6); 16 prompts of 60 tokens with 32 new ones, a single prompt, and the
same 16 with top_p (SmolLM2-135M); loading 16 adapters.

    python benchmarks/fast_paths_engine.py                     about half an hour with two threads
    python benchmarks/fast_paths_engine.py --pairs 1           every path once
    python benchmarks/fast_paths_engine.py --paths low_rank
    python benchmarks/fast_paths_engine.py --report
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import record
from serve_sides import BASES, LABELS, Shelf, adapters, answered, use_threads

NAME = "fast_paths_engine"
CLAIM = "each fast path of the engine makes some whole job at least 5% faster"
TEXTS, PROMPTS, NEW_TOKENS = 32, 16, 32
Job = Callable[[], float]  # runs once, returns its seconds
Patch = tuple[Any, str, Any]  # an object, the name of its attribute, and the value without the path


@dataclass(frozen=True)
class Path:
    """A fast path.

    Args:
        jobs: Where it may show.
        off: Paths that are off on both sides.
        row: What it computes, its reference, and when it is taken, for docs/explanation/fast-paths.md. None if
            `turret.ops.table.PATHS` lists it.
    """

    jobs: tuple[str, ...]
    off: tuple[str, ...] = ()
    row: tuple[str, str, str] | None = None


LAYERS, KERNELS = "layers in one call", "all kernels"
PATHS = {
    KERNELS: Path(("texts", "short texts", "prompts", "one prompt")),
    LAYERS: Path(("short texts", "prompts", "one prompt")),
    "low_rank": Path(
        ("texts", "short texts", "prompts", "one prompt"),
        (LAYERS,),
        ("SGMV: the LoRA of every token of a pass, one call for each layer", "`ops.lora.sgmv`", "with kernels"),
    ),
    "step attention": Path(("prompts", "one prompt"), (LAYERS,)),
    "few-token products": Path(("short texts", "prompts", "one prompt"), (LAYERS,)),
    "prefill attention": Path(("texts", "short texts", "prompts"), (LAYERS,)),
    "layer": Path(("texts", "short texts", "prompts", "one prompt"), (LAYERS,)),
    "lay_out": Path(
        ("load",),
        (),
        (
            "copies and scales the factors of an adapter",
            "torch, in `AdapterPool._lay_out`",
            "a LoRA loads, with kernels",
        ),
    ),
    "long passes": Path(
        ("texts",), (), ("passes of 1024 tokens", "passes of 512 tokens", "a small encoder (`runner.SMALL`)")
    ),
    "top_p of few": Path(
        ("prompts with top_p",), (), ("sorts 64 tokens first, more if needed", "sort the vocabulary", "top_p samples")
    ),
}


def patches(name: str, engine: Any) -> list[Patch]:
    """How each path is switched off: the one place that knows."""
    from turret.adapters import attention, layers
    from turret.engine import runner, sampler
    from turret.ops import lora
    from turret.ops.core import Ops
    from turret.ops.cpu import compiled
    from turret.ops.cpu.compiled import CpuOps

    def none(*_: Any) -> None:
        return None

    return {
        KERNELS: lambda: [(compiled, "library", none)],
        LAYERS: lambda: [(layers.OneCall, "__call__", none)],
        "low_rank": lambda: [(lora, "CpuRows", lambda _, spans, tokens: lora.MixedRows(spans))],
        "step attention": lambda: [(CpuOps, "kv_step", none)],
        "few-token products": lambda: [(CpuOps, "few", lambda *_: 0)],
        "prefill attention": lambda: [(attention, "_unpadded", attention._unpadded_plainly)],
        "layer": lambda: [(layers.LayerHook, "_block", none)],
        "lay_out": lambda: [(CpuOps, "lay_out", Ops.lay_out)],
        "long passes": lambda: [(engine._scheduler, "batch_tokens", runner.SHORT_PASS)],
        "top_p of few": lambda: [(sampler, "LOOKED_AT", 1 << 30)],
    }[name]()  # fmt: skip


@contextlib.contextmanager
def switched_off(names: Sequence[str], engine: Any) -> Iterator[None]:
    """The engine without these paths for the length of the block; no request is under way."""
    with contextlib.ExitStack() as stack:
        for name in names:
            for owner, attribute, value in patches(name, engine):
                stack.callback(setattr, owner, attribute, getattr(owner, attribute))
                setattr(owner, attribute, value)
        yield


def main() -> None:
    options = _options()
    if not options.report:
        use_threads(options.threads)
        for dtype in options.dtypes:
            for kind in BASES:
                for path, job, seconds in measured(kind, dtype, options):
                    settings = {"path": path, "job": job, "dtype": dtype, "threads": options.threads}
                    run = {"settings": settings, "off_on_both": list(PATHS[path].off), "seconds": seconds}
                    record.keep(NAME, CLAIM, {**run, "machine": record.machine(options.threads)})
    print(report(record.newest(record.load(NAME), lambda run: repr(run["settings"]))))


def measured(kind: str, dtype: str, options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """(path, job, seconds of each pair with and without it) of the jobs of one base."""
    from turret import bases
    from turret.engine import Engine, Limits

    task: Any = "classify" if kind == "encoder" else "generate"
    base = bases.load(BASES[kind], task=task, num_labels=LABELS if task == "classify" else None, dtype=dtype)
    if task == "generate":  # the same number of tokens on every side, whatever they are
        base.model.generation_config.min_new_tokens = NEW_TOKENS
    shelf = Shelf()
    shelf.adapters = adapters(base.model, task, TEXTS if task == "classify" else PROMPTS)
    with Engine(base, shelf, Limits(slots=256)) as engine:
        jobs = encoder_jobs(engine, options.seed) if task == "classify" else decoder_jobs(engine, shelf, options.seed)
        for path in options.paths:
            for job in PATHS[path].jobs:
                if job in jobs:
                    yield path, job, in_pairs(jobs[job], path, job, engine, options.pairs)


def encoder_jobs(engine: Any, seed: int) -> dict[str, Job]:
    generator = random.Random(seed)
    texts = [_tokens(generator, generator.randint(64, 256)) for _ in range(TEXTS)]
    short = [_tokens(generator, 12) for _ in range(16)]
    names = [f"a{number}" for number in range(TEXTS)]

    def one_by_one() -> None:
        for text, name in zip(short, names, strict=False):
            answered(engine, "classify", [text], [name], 1)

    return {"texts": _timed(lambda: answered(engine, "classify", texts, names, 1)), "short texts": _timed(one_by_one)}


def decoder_jobs(engine: Any, shelf: Shelf, seed: int) -> dict[str, Job]:
    from turret.engine import SamplingParams

    generator = random.Random(seed)
    prompts = [_tokens(generator, 60) for _ in range(PROMPTS)]
    names = [f"a{number}" for number in range(PROMPTS)]
    sampled = SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0, top_p=0.9, seed=seed)
    for number in range(PROMPTS):
        shelf.adapters[f"new{number}"] = shelf.adapters[f"a{number}"]

    def with_top_p() -> None:
        tickets = [engine.submit("generate", row, name, sampled) for row, name in zip(prompts, names, strict=True)]
        for ticket in tickets:
            ticket.result()

    def load() -> float:
        began = time.perf_counter()
        for number in range(PROMPTS):
            engine.warm(f"new{number}")
        seconds = time.perf_counter() - began
        for number in range(PROMPTS):
            engine.unload(f"new{number}")
        return seconds

    return {
        "prompts": _timed(lambda: answered(engine, "generate", prompts, names, NEW_TOKENS)),
        "one prompt": _timed(lambda: answered(engine, "generate", prompts[:1], names[:1], NEW_TOKENS)),
        "prompts with top_p": _timed(with_top_p),
        "load": load,
    }


def _tokens(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(1000, 20_000) for _ in range(count)]


def _timed(work: Callable[[], None]) -> Job:
    def job() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return job


def in_pairs(job: Job, path: str, name: str, engine: Any, pairs: int) -> dict[str, list[float]]:
    """Seconds of each pair; which side goes first alternates. A first pair is not counted."""
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for pair in range(pairs + 1):
        for side in ("with", "without") if pair % 2 else ("without", "with"):
            off = [*PATHS[path].off, *([path] if side == "without" else [])]
            with switched_off(off, engine):
                took = job()
            if pair:
                seconds[side].append(round(took, 5))
    print(f"{path}, {name}: {_ratio(seconds)}", file=sys.stderr, flush=True)
    return seconds


def _ratio(run: Mapping[str, Any]) -> str:
    """Seconds without the path over seconds with it."""
    return record.shown(record.ratio(run["seconds"]["without"], run["seconds"]["with"]), 3, "")


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row for each path, job and precision."""
    rows = []
    for run in runs:
        own = run["settings"]
        times = [
            f"{1e3 * sorted(each)[len(each) // 2]:.0f}" for each in (run["seconds"]["with"], run["seconds"]["without"])
        ]
        what = [own["path"], own["job"], own["dtype"], ", ".join(run["off_on_both"])]
        rows.append([*what, *times, _ratio(run), run["machine"]["device"]])
    header = ["path", "job", "precision", "off on both sides", "ms with", "ms without", "times as long without"]
    return record.table([*header, "machine"], rows)


def figures(machine: Callable[[Mapping[str, Any]], str]) -> str:
    """The engine's own paths with what each buys on the processor of the newest run. machine: names it."""
    runs = record.newest(record.load(NAME), lambda run: repr(run["settings"]))
    newest = max(runs, key=lambda run: run["machine"]["at"], default=None)
    rows = []
    for name, path in PATHS.items():
        if path.row is not None:
            own = [run for run in runs if run["settings"]["path"] == name]
            own = [run for run in own if newest is not None and run["machine"]["device"] == newest["machine"]["device"]]
            buys = [f"{run['settings']['job']} ({run['settings']['dtype']}) {_ratio(run)}" for run in own]
            rows.append([name, *path.row, "; ".join(buys) or "not measured"])
    header = ["path", "computes", "reference", "taken when", "times as long without"]
    where = "" if newest is None else f"On {machine(newest)}, {newest['machine']['threads']} threads:\n\n"
    return where + record.table(header, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="print the table of the kept runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
