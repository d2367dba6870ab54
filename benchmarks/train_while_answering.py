"""Claim: trainings on the base that answers delay answers as little as the operator says.

One engine answers at a steady rate, one request after another on a clock, without trainings and with several trainings
that never rest. The share of the time that trainings get while answers wait (`Limits.train_percent`) has three
settings. The times are those from the planned arrival of a request to its answer. Trainings: LoRA r=8, batches of 8
texts of about 60 tokens, in passes of at most 512 tokens.

    python benchmarks/train_while_answering.py             both bases, about six minutes with two threads
    python benchmarks/train_while_answering.py --report
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import record
from serve_sides import BASES, Shelf, adapters, use_threads

NAME = "train_while_answering"
CLAIM = "trainings on the base that answers delay answers as little as the operator says"
RATES = {"encoder": 20.0, "decoder": 1.5}  # requests a second
SETTINGS: tuple[int | None, ...] = (None, 20, 50, 80)  # train_percent; None: no training
SLOTS, TOKENS = 4, 16
WORDS = (
    *("the", "market", "fell", "again", "on", "friday", "and", "the", "minister", "said"),
    *("that", "the", "talks", "go", "on", "in", "london"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each setting (40)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--report", action="store_true", help="what the kept runs say")
    options = parser.parse_args()
    if not options.report:
        use_threads(options.threads)
        for side in options.sides:
            record.keep(NAME, CLAIM, measure(side, options))
    print(report(record.load(NAME)))


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """All settings on one base, one after another."""
    from turret import bases
    from turret.bases.base import share_weights
    from turret.engine import Engine, Limits

    task = "classify" if side == "encoder" else "generate"
    base = bases.load(BASES[side], task=task)
    shelf = Shelf()
    shelf.adapters = adapters(share_weights(base, num_labels=5 if side == "encoder" else None).model, task, 4)
    rows = []
    for percent in SETTINGS:
        with Engine(base, shelf, Limits(train_percent=percent or 50)) as engine:
            ask(engine, task, RATES[side], 3.0)  # warm: adapters are loaded
            with training(engine, side, percent is not None) as steps:
                began = time.monotonic()
                seconds = ask(engine, task, RATES[side], options.seconds)
                rate = sum(steps) / (time.monotonic() - began)
        rows.append({"train_percent": percent, "seconds": seconds, "steps_per_second": rate})
    return {"settings": {"base": BASES[side], "rate": RATES[side]}, "rows": rows, "machine": record.machine(2)}


def ask(engine: Any, task: str, rate: float, seconds: float) -> list[float]:
    """The seconds of each answer, from its planned arrival."""
    from turret.engine import SamplingParams

    options = SamplingParams(max_tokens=TOKENS, temperature=0.0) if task == "generate" else None
    arrived, answered, started = list[float](), dict[int, float](), time.monotonic()
    tickets = []
    for number in range(int(rate * seconds)):
        arrived.append(started + number / rate)
        time.sleep(max(0.0, arrived[-1] - time.monotonic()))
        text = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(40))
        ticket = engine.submit(task, text, f"a{number % 4}", options)
        ticket.add_done_callback(lambda _, number=number: answered.setdefault(number, time.monotonic()))
        tickets.append(ticket)
    for ticket in tickets:
        ticket.result(120)
    return [answered[number] - arrived[number] for number in range(len(tickets))]


@contextmanager
def training(engine: Any, side: str, trains: bool) -> Iterator[list[int]]:
    """Trainings that step for the length of the block. Yields the steps of each."""
    from turret.data import Labelled, Pair
    from turret.engine import OptimStep
    from turret.train import TrainingSlot

    texts = [" ".join(WORDS[(row * 7 + place) % len(WORDS)] for place in range(50)) for row in range(8)]
    encoder = side == "encoder"
    examples = [Labelled(text, "ab"[row % 2]) if encoder else Pair(text, text[:40]) for row, text in enumerate(texts)]
    steps, over = [0] * SLOTS, threading.Event()

    def train(place: int) -> None:
        kind: dict[str, Any] = {"kind": "classify", "labels": "ab"} if encoder else {"kind": "summarize"}
        with TrainingSlot(engine, f"t{place}", "lora", seed=place, most_tokens=512, **kind) as slot:
            while not over.is_set():
                slot.forward_backward(examples)
                slot.optim_step(OptimStep(1e-4))
                steps[place] += 1

    threads = [threading.Thread(target=train, args=[place]) for place in range(SLOTS if trains else 0)]
    for thread in threads:
        thread.start()
    try:
        if threads:
            time.sleep(2.0)
            steps[:] = [0] * SLOTS
        yield steps
    finally:
        over.set()
        for thread in threads:
            thread.join()


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Median and 95th percentile of the newest run of each base."""
    lines = []
    for run in record.newest(runs, lambda run: run["settings"]["base"]):
        for row in run["rows"]:
            cuts = statistics.quantiles(row["seconds"], n=20)
            percent = "no training" if row["train_percent"] is None else f"{row['train_percent']}%"
            lines.append(
                [
                    f"{run['settings']['base']}, {run['settings']['rate']:g}/s",
                    percent,
                    len(row["seconds"]),
                    f"{1000 * statistics.median(row['seconds']):.0f} ms",
                    f"{1000 * cuts[-1]:.0f} ms",
                    f"{row['steps_per_second']:.1f}",
                ]
            )
    return record.table(["base", "train_percent", "answers", "median", "p95", "training steps a second"], lines)


if __name__ == "__main__":
    main()
