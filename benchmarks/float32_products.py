"""Claim: where oneDNN multiplies true float32 faster than torch's default library, turret's float32 work is faster too.

One process computes everything in turns, once with torch's default products and once as turret sets them: a batch of 32
texts of 64 to 256 tokens through all-MiniLM-L6, bare and with 32 LoRAs, and a training step of LoRA on 8 texts of 256
tokens. Each ratio is of the same round. Beside them: the largest difference of the answers between both.

    python benchmarks/float32_products.py --rounds 10
    python benchmarks/float32_products.py --report
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
from serve_sides import BASES, LABELS, Shelf, adapters, answered, use_threads

NAME = "float32_products"
CLAIM = "float32 work is faster with the library that turret chooses, at the same error"
COUNT = 32  # texts, and adapters
DEFAULT, CHOSEN = "none", "bf16"  # of torch's setting; turret takes the second only where it does not round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    options = parser.parse_args()
    if not options.report:
        use_threads(options.threads)
        settings = {"rounds": options.rounds, "threads": options.threads}
        record.keep(NAME, CLAIM, {"settings": settings, **measure(options), "machine": record.machine(options.threads)})
    print(report(record.load(NAME)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from turret import bases
    from turret.engine import Engine, Limits

    base = bases.load(BASES["encoder"], task="classify", num_labels=LABELS, dtype="float32")
    shelf = Shelf()
    shelf.adapters = adapters(base.model, "classify", COUNT)
    generator = random.Random(0)
    rows = [[generator.randrange(1000, 20_000) for _ in range(generator.randint(64, 256))] for _ in range(COUNT)]
    names = [f"a{number}" for number in range(COUNT)]
    setting: Any = torch.backends.mkldnn.matmul
    seconds: dict[str, dict[str, list[float]]] = {}
    with Engine(base, shelf, Limits(running=64, slots=2048)) as engine:
        jobs: dict[str, Callable[[], Any]] = {
            "batch, bare base": lambda: answered(engine, "classify", rows, [None] * COUNT, 1),
            "batch, 32 adapters": lambda: answered(engine, "classify", rows, names, 1),
        }
        for job in jobs.values():
            job()
        seconds |= in_turns(jobs, setting, options.rounds)
    seconds |= in_turns({"LoRA step, 8 x 256 tokens": training_step()}, setting, options.rounds)
    return {"found": str(bases.float32_products()), "error": bases.float32_products().error, "seconds": seconds}


def in_turns(jobs: dict[str, Callable[[], Any]], setting: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Job -> setting -> seconds, round after round; the first round of both is not counted."""
    times: dict[str, dict[str, list[float]]] = {name: {DEFAULT: [], CHOSEN: []} for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            for way in (DEFAULT, CHOSEN):
                setting.fp32_precision = way
                began = time.perf_counter()
                job()
                if turn:
                    times[name][way].append(time.perf_counter() - began)
    return times


def training_step() -> Callable[[], Any]:
    """Forward and backward of LoRA on all-MiniLM-L6, on one batch of random tokens."""
    import torch

    import turret
    from turret import bases

    model = bases.load(BASES["encoder"], task="classify", num_labels=LABELS, dtype="float32").model
    turret.attach(model, turret.LoRA())
    model.train()
    ids = torch.randint(1000, 20_000, (8, 256))
    labels = torch.zeros(8, dtype=torch.long)
    return lambda: model(input_ids=ids, labels=labels).loss.backward()


def report(runs: list[dict[str, Any]]) -> str:
    """A row a run and job."""
    rows = []
    for run in runs:
        for name, ways in run["seconds"].items():
            rows.append([
                run["machine"]["device"], name, f"{1000 * statistics.median(ways[DEFAULT]):.0f}",
                f"{1000 * statistics.median(ways[CHOSEN]):.0f}",
                record.shown(record.ratio(ways[DEFAULT], ways[CHOSEN])), f"{run['error']:.0e}",
            ])  # fmt: skip
    return record.table(["machine", "job", "ms, torch's default", "ms, as chosen", "faster", "error"], rows)


if __name__ == "__main__":
    main()
