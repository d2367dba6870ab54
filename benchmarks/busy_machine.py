"""Claim: two trainings at once share a machine, where OpenMP's own way of waiting makes each several times slower.

One LoRA on short texts (all-MiniLM-L6, 8 texts of 28 tokens a step): alone on the machine, beside a process that keeps
one processor busy, and beside another such training. With the threads that the `turret` command takes and its way of
letting them wait (`turret.process.wait_briefly`), with the way of OpenMP's library, and with one thread. Every way is a
process of its own, in turn, round after round.

    python benchmarks/busy_machine.py           ten minutes
    python benchmarks/busy_machine.py --report
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import record
import train_sides as sides

NAME = "busy_machine"
CLAIM = "two trainings at once share a machine, where OpenMP's own way of waiting makes each several times slower"
WARM = 4  # steps before those that count
SECONDS = 40.0  # of one way, at most


@contextlib.contextmanager
def beside(command: Sequence[str] | None, variables: Mapping[str, str]) -> Iterator[None]:
    """Another process at work for the length of the block, or none."""
    if command is None:
        yield
        return
    process = subprocess.Popen(command, env=dict(variables), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def ways(threads: int) -> dict[str, dict[str, str]]:
    """What each way sets in the environment."""
    from turret.process import SPIN

    return {
        f"{threads} threads, as `turret` has them wait": {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": SPIN},
        f"{threads} threads, as their library waits": {"OMP_NUM_THREADS": str(threads)},
        "1 thread": {"OMP_NUM_THREADS": "1"},
    }


def main() -> None:
    options = _options()
    if options.worker:
        print(json.dumps(_worker(Path(options.worker), options.steps)))
        return
    if not options.report:
        record.keep(NAME, CLAIM, measure(options))
    print(report(record.load(NAME)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "short.jsonl"
        sides.sentences(data)
        others = {
            "alone": None,
            "beside one that counts": [sys.executable, "-c", "while True: pass"],
            "beside another": _worker_command(data, 3000),
        }
        for number in range(options.rounds):
            for where, command in others.items():
                for way, variables in ways(options.threads).items():
                    whole = _environment() | variables
                    with beside(command, whole):
                        done = subprocess.run(
                            _worker_command(data, options.steps), env=whole, check=True, stdout=subprocess.PIPE
                        )
                    seconds = statistics.median(json.loads(done.stdout.splitlines()[-1]))
                    name = f"{way}, {where}"
                    found.setdefault(name, []).append(seconds)
                    print(f"round {number + 1}: {name}: {1e3 * seconds:.0f} ms a step", file=sys.stderr, flush=True)
    settings = {"rounds": options.rounds, "steps": options.steps, "threads": options.threads}
    return {"settings": settings, "seconds": found, "machine": record.machine(options.threads)}


def _worker_command(data: Path, steps: int) -> list[str]:
    return [sys.executable, __file__, "--worker", str(data), "--steps", str(steps)]


def _environment() -> dict[str, str]:
    """This one without a word on how threads wait."""
    from turret.process import OPENMP_VARIABLES

    return {name: value for name, value in os.environ.items() if name not in OPENMP_VARIABLES}


class _Clock:
    """`train_sides.Turns` for one who has nobody to wait for: the seconds of the steps that count."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.done = 0
        self._began = self._first = 0.0

    def begin(self) -> None:
        if self.done == WARM:
            self._first = time.perf_counter()
        if self.seconds and time.perf_counter() - self._first > SECONDS:
            raise _Enough
        self._began = time.perf_counter()

    def end(self) -> None:
        self.done += 1
        if self.done > WARM:
            self.seconds.append(time.perf_counter() - self._began)

    def say(self, **_: Any) -> None:
        pass


class _Enough(Exception):
    """The steps there are will do."""


def _worker(data: Path, steps: int) -> list[float]:
    import torch

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    clock: Any = _Clock()
    errand = sides.Errand(
        job="short", side=sides.TURRET, source=str(data), seed=0, steps=WARM + steps, lr=1e-3, threads=threads,
        train=400, test=8,
    )  # fmt: skip
    with contextlib.suppress(_Enough):
        sides.ours(errand, clock)
    return clock.seconds


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    texts = []
    for run in runs:
        rows = []
        for name, seconds in run["seconds"].items():
            way, _, where = name.rpartition(", ")
            alone = statistics.median(run["seconds"][f"{way}, alone"])
            own = statistics.median(seconds)
            spread = f"{1e3 * own:.0f} ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"
            rows.append([way, where, spread, f"{own / alone:.1f}"])
        header = ["", "", "ms a step, median (least to most)", "times alone"]
        texts.append(f"{run['machine']['device']}\n\n{record.table(header, rows)}")
    return "\n\n".join(texts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
