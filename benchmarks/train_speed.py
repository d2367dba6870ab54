"""Claim: turret trains an adapter several times faster than HF Trainer + PEFT, in a fraction of the memory, as well.

LoRA on short texts and on whole articles, every weight on short texts (all-MiniLM-L6), LoRA and prefix on article ->
headline (SmolLM2-135M): the same examples, token ids, order, batch size, steps, learning rate, schedule and AdamW on
every side. Every side has a process of its own; they take turns, a block of the same steps each, round after round, and
sleep in between, so that what else the machine does hits all alike. Knows turret by the names its rooms export, in
`train_sides.py`.

- A step lasts from leave to step (the first of a block) or the end of the step before to its end.
- Ratio: a side's time of a block over turret's of the same block; the median over the rounds, with a 95% interval.
- Tokens are real ones, never padding. FLOPs of a step: 2 * 2 * (N * tokens + M * target tokens): forward, and backward
  through the activations (frozen weights have no gradient; where every weight is trained it is 3 * 2 *). N weights
  without embeddings, pooler and output layer, M weights of the output layer; attention scores and the adapter are left
  out. The share is of the fastest matrix product (2048 x 576 x 1536, float32 or bfloat16) of this machine with these
  threads.
- Memory: resident bytes once the base is loaded and looked at, and the peak (VmHWM) from there to the last step. Code
  of libraries that came in with the first steps is in it, and named beside it: the same tens of MB on every side.

    python benchmarks/train_speed.py                        all jobs; half an hour
    python benchmarks/train_speed.py --jobs short --rounds 3
    python benchmarks/train_speed.py --quality              five seeds a job, both sides; goes on where it stopped
    python benchmarks/train_speed.py --report
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import record
import rival as hf
import train_sides as sides
from side import Side
from train_sides import JOBS, RIVAL, SCORED, SIDES, WARM

NAME = "train_speed"
CLAIM = "turret trains an adapter several times faster than HF Trainer + PEFT, in a fraction of the memory, as well"
LEARNING_RATE = 1e-3
SMALL_TEST = 8  # a run for speed holds out next to nothing
MOST_EXAMPLES = 1600  # of a run for speed; further steps see them again
Run = dict[str, Any]


def main() -> None:
    options = _options()
    if options.worker is not None:
        sides.main(options.worker)
        return
    if not options.report:
        with tempfile.TemporaryDirectory() as folder:
            (measure_quality if options.quality else measure_speed)(options, Path(folder))
    print(report(record.newest(record.load(NAME), _key)))


def _started(words: Mapping[str, Any], threads: int, log: Path) -> Side:
    limits = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return Side([sys.executable, __file__, "--worker", json.dumps(words)], log, limits)


@contextmanager
def _side(words: Mapping[str, Any], threads: int, log: Path) -> Iterator[Side]:
    side = _started(words, threads, log)
    try:
        yield side
    finally:
        side.end()


def _source(name: str, options: argparse.Namespace, folder: Path) -> str:
    """Where a job's examples are."""
    if not JOBS[name].sentences:
        return JOBS[name].source
    if options.data is not None:
        return str(options.data)
    path = folder / "sentences.jsonl"
    if not path.exists():
        sides.sentences(path)
    return str(path)


# --- speed -----------------------------------------------------------------------------------------------------------


def measure_speed(options: argparse.Namespace, folder: Path) -> None:
    """All sides of a job in turns, a job after the other."""
    with _side({"prepare": options.jobs, "threads": options.threads}, options.threads, folder / "log") as side:
        peaks = side.hear("peaks")
    for name in options.jobs:
        steps, rounds = options.steps or JOBS[name].steps, options.rounds or JOBS[name].rounds
        results = _in_turns(name, steps, rounds, options, folder)
        settings = {
            "job": name, "rounds": rounds, "steps": steps, "batch": hf.BATCH, "lr": LEARNING_RATE,
            "seed": options.seed, "threads": options.threads, "data": str(options.data) if options.data else None,
        }  # fmt: skip
        run = {
            "what": "speed", "settings": settings, "peaks": peaks, "sides": results,
            "machine": record.machine(options.threads),
        }  # fmt: skip
        record.keep(NAME, CLAIM, run)
        print(f"{name}: done", file=sys.stderr, flush=True)


def _in_turns(name: str, steps: int, rounds: int, options: argparse.Namespace, folder: Path) -> dict[str, Run]:
    """Side -> its blocks and facts, or why it did not run. No two sides work at the same time, at the start neither."""
    total = WARM + rounds * steps
    started: dict[str, Side] = {}
    results: dict[str, Run] = {}

    def attempt(who: str, act: Callable[[], object]) -> None:
        try:
            act()
        except (RuntimeError, OSError) as error:
            results[who] = {"failed": str(error)}
            started.pop(who).end()
            print(f"{name}, {who}: {error}", file=sys.stderr, flush=True)

    def start(who: str) -> None:
        errand = sides.Errand(
            job=name, side=who, source=_source(name, options, folder), seed=options.seed, steps=total,
            lr=LEARNING_RATE, threads=options.threads, train=min(MOST_EXAMPLES, total * hf.BATCH), test=SMALL_TEST,
        )  # fmt: skip
        started[who] = _started(asdict(errand), options.threads, folder / f"{who}.log")
        attempt(who, partial(started[who].hear, "ready"))
        results.setdefault(who, {"blocks": []})

    def block(who: str, last: bool) -> None:
        started[who].tell(steps)
        results[who]["blocks"].append(started[who].hear("seconds"))
        if last:
            results[who] |= started[who].hear("facts")  # heard out, so that its end falls into nobody's turn

    try:
        for who in (each for each in options.sides if each in JOBS[name].sides):
            start(who)
        for turn in range(rounds):
            order = list(started)
            for who in order[turn % len(order) :] + order[: turn % len(order)] if order else []:
                attempt(who, partial(block, who, last=turn + 1 == rounds))
            print(f"{name}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        for each in started.values():
            each.end()
    return results


# --- quality ---------------------------------------------------------------------------------------------------------


def measure_quality(options: argparse.Namespace, folder: Path) -> None:
    """Every job, seed and side that is not kept yet; the seed draws the examples and starts the weights.

    LoRA and its head start from the same numbers on both sides. A prefix does not: each side starts it in its own way,
    which is compared too. A job runs only if all scored sides can do it.
    """
    for name in options.jobs:
        job = JOBS[name]
        if not set(SCORED) <= set(job.sides):
            continue
        train, test = options.train or job.train, options.test or job.test
        for seed in options.seeds:
            for who in (each for each in SCORED if each in options.sides):
                settings = {
                    "job": name, "train": train, "test": test, "epochs": options.epochs, "batch": hf.BATCH,
                    "lr": LEARNING_RATE, "threads": options.threads,
                    "start": "the same" if job.method == "lora" else "each its own",
                    "data": str(options.data) if options.data else None,
                }  # fmt: skip
                run: Run = {"what": "quality", "who": who, "seed": seed, "settings": settings}
                if any(_key(kept) == _key(run) for kept in record.load(NAME)):
                    continue
                errand = sides.Errand(
                    job=name, side=who, source=_source(name, options, folder), seed=seed,
                    steps=-(-train // hf.BATCH) * options.epochs, lr=LEARNING_RATE, threads=options.threads,
                    train=train, test=test, scored=True,
                )  # fmt: skip
                with _side(asdict(errand), options.threads, folder / "log") as side:
                    run |= side.hear("facts")
                for each in ("tokens", "target_tokens", "examples"):
                    run.pop(each)
                record.keep(NAME, CLAIM, {**run, "machine": record.machine(options.threads)})
                print(f"{name}, seed {seed}, {who}: {run['metric']:.4f} in {run['train_seconds']:.0f} s", flush=True)


# --- what the kept runs say ------------------------------------------------------------------------------------------


def report(runs: Sequence[Run]) -> str:
    """A table a run for speed, then a table a job for quality."""
    texts = [_speed(run) for run in runs if run["what"] == "speed"]
    quality = [run for run in runs if run["what"] == "quality"]
    texts += [
        _quality([run for run in quality if json.dumps(run["settings"]) == settings])
        for settings in dict.fromkeys(json.dumps(run["settings"]) for run in quality)
    ]
    return "\n\n".join(texts)


def _speed(run: Run) -> str:
    done = {who: side for who, side in run["sides"].items() if "failed" not in side}
    header = [
        "", "ms a step", "examples/s", "tokens/s", "share of GEMM", "base MB", "peak MB", "above base MB",
        "of it libraries", "time against turret",
    ]  # fmt: skip
    job, peak = JOBS[run["settings"]["job"]], max(run["peaks"].values())
    rows = [
        _speed_row(who, side, None if who == job.ours else done.get(job.ours), peak, job.flops)
        for who, side in done.items()
    ]
    peaks = ", ".join(f"{dtype} {value / 1e9:.0f} GFLOP/s" for dtype, value in run["peaks"].items())
    lines = [_title(run), f"GEMM: {peaks}", "", record.table(header, rows)]
    predicted = [[who, *_predicted(side)] for who, side in done.items() if side["predicted"]]
    if predicted:
        columns = ["MB", "above base: planned", "measured", "off", "total: planned", "measured", "off"]
        lines += ["", record.table(columns, predicted)]
    lines += [f"\n{who} did not run: {side['failed']}" for who, side in run["sides"].items() if "failed" in side]
    return "\n".join(lines)


def _title(run: Run) -> str:
    settings = run["settings"]
    said = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "job" and value is not None)
    return f"**{settings['job']}** ({said}; {run['machine']['device']})"


def _speed_row(who: str, side: Run, beside: Run | None, peak: float, flops_per_weight: float) -> list[str]:
    blocks = side["blocks"]
    seconds = [sum(block) for block in blocks]

    def rate(each: Sequence[float]) -> float:
        """The median over blocks of so much a second."""
        step = WARM
        rates: list[float] = []
        for block, length in zip(blocks, seconds, strict=True):
            rates.append(sum(each[step : step + len(block)]) / length)
            step += len(block)
        return statistics.median(rates)

    flops = [
        flops_per_weight * (side["forward_weights"] * tokens + side["output_weights"] * targets)
        for tokens, targets in zip(side["tokens"], side["target_tokens"], strict=True)
    ]
    ratio = "-"
    if beside is not None:
        ratio = record.shown(record.ratio(seconds, [sum(block) for block in beside["blocks"]]), unit="")
    sizes = (side["resident"], side["peak"], side["peak"] - side["resident"], side["libraries"])
    return [
        who,
        f"{1000 * statistics.median(one for block in blocks for one in block):.0f}",
        f"{rate(side['examples']):.1f}",
        f"{rate(side['tokens']):.0f}",
        f"{rate(flops) / peak:.1%}",
        *(f"{size / 1e6:.0f}" for size in sizes),
        ratio,
    ]


def _predicted(side: Run) -> Iterator[str]:
    planned = side["predicted"]
    for said, seen in ((planned["above_base"], side["peak"] - side["resident"]), (planned["total"], side["peak"])):
        yield from (f"{said / 1e6:.0f}", f"{seen / 1e6:.0f}", f"{said / max(seen, 1) - 1:+.0%}")


def _quality(runs: Sequence[Run]) -> str:
    sides_ = {who: {run["seed"]: run for run in runs if run["who"] == who} for who in SCORED}
    sides_ = {who: of for who, of in sides_.items() if of}
    metric = "accuracy" if JOBS[runs[0]["settings"]["job"]].kind == "classify" else "loss per target token"
    seeds = sorted({run["seed"] for run in runs})
    rows: list[list[object]] = [
        [seed, *(f"{of[seed]['metric']:.4f}" if seed in of else "-" for of in sides_.values())] for seed in seeds
    ]
    common = [seed for seed in seeds if all(seed in of for of in sides_.values())]
    if common:
        means = [statistics.fmean(of[seed]["metric"] for seed in common) for of in sides_.values()]
        rows.append([f"mean of {len(common)}", *(f"{mean:.4f}" for mean in means)])
    text = f"{_title(runs[0])}: {metric}\n\n" + record.table(["seed", *sides_], rows)
    theirs = sides_.get(RIVAL, {})
    for who, of in sides_.items():
        paired = [(theirs[seed], of[seed]) for seed in seeds if seed in theirs and seed in of]
        if who != RIVAL and len(paired) > 1:
            text += f"\n\n{_difference(who, paired)}"
    return text


def _difference(who: str, paired: Sequence[tuple[Run, Run]]) -> str:
    by_seed = record.student([b["metric"] - a["metric"] for a, b in paired])
    each = [y - x for a, b in paired for x, y in zip(a["each"], b["each"], strict=True)]
    weights = [weight for a, _ in paired for weight in a.get("weights", [])] or None
    return (
        f"{who} - rival, paired over {len(paired)} seeds: {by_seed} (95%, Student's t)\n"
        f"{who} - rival, paired over {len(each)} answers: {record.bootstrap(each, weights)} (95%, bootstrap)"
    )


def _key(run: Mapping[str, Any]) -> tuple[object, ...]:
    return run["what"], run.get("who"), run.get("seed"), json.dumps(run["settings"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--rounds", type=int, help="blocks of every side, instead of the job's own number")
    parser.add_argument("--steps", type=int, help="optimiser steps of a block, instead of the job's own number")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0, help="of a run for speed")
    parser.add_argument("--data", type=Path, help="JSONL with text and label for the job `short`")
    parser.add_argument("--quality", action="store_true", help="train and score both sides instead of timing them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of --quality")
    parser.add_argument("--train", type=int, help="examples of --quality, instead of the job's own number")
    parser.add_argument("--test", type=int, help="the same, held out")
    parser.add_argument("--epochs", type=int, default=1, help="of --quality")
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
