"""Claim: HTTP, queue and the mixture of 64 clients cost little of what the engine answers in one offline batch.

A `turret serve` process on loopback with adapters promoted in a store; 64 clients of one process, each asking again as
soon as it is answered, each time for another adapter (zipf). First the same requests go to the engine alone in one
batch: its rate is the offline rate. Server, engine and clients share the same cores, so the share counts the clients'
own work too. Bounded: so many requests, or so many seconds.

    python benchmarks/serve_load.py             some minutes (make bench-serve runs it after serve_speed.py)
    python benchmarks/serve_load.py --kinds encoder --requests 256
    python benchmarks/serve_load.py --report
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
from serve_sides import BASES, LABELS, adapters

NAME = "serve_load"
CLAIM = "64 clients over HTTP get most of what one offline batch of the same requests gets"
ADAPTERS, TOKENS, WORDS = 32, 32, {"encoder": (60, 250), "decoder": (50, 50)}
Asked = tuple[str, str]  # adapter, text


def main() -> None:
    options = _options()
    if not options.report:
        from turret.bases.device import native_bfloat16

        options.dtype = options.dtype or ("bfloat16" if native_bfloat16() else "float32")
        for kind in options.kinds:
            with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
                measured = measure(kind, Path(folder), options)
            settings = {"kind": kind, "dtype": options.dtype, "threads": options.threads, "clients": options.clients}
            run = {"settings": settings, **measured, "machine": record.machine(options.threads)}
            record.keep(NAME, CLAIM, run)
    print(report(record.newest(record.load(NAME), lambda run: repr(run["settings"]))))


def measure(kind: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    count = options.requests if kind == "encoder" else options.requests // 4
    asked = filled(kind, folder, count, options)
    offline = one_batch(kind, folder, asked, options)
    with serving(kind, folder, options) as url:
        found = asyncio.run(all_clients(url, kind, asked, options))
    return {"requests": len(found["seconds"]), "asked": count, "offline": offline, **found}


@contextmanager
def serving(kind: str, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """A server in a process of its own; its URL."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-m", "turret", "serve", "--base", BASES[kind], "--dtype", options.dtype, "--port", "0",
               "--store", str(folder / "store"), "--json"]  # fmt: skip
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as server,
    ):
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: {(folder / 'log').read_text()[-500:]}")
            yield json.loads(line)["url"]
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()


def filled(kind: str, folder: Path, count: int, options: argparse.Namespace) -> list[Asked]:
    """A store with promoted adapters, and what will be asked of which."""
    import torch

    from turret import bases
    from turret.adapters import BaseInfo
    from turret.bundles import save_bundle
    from turret.workspace import Workspace

    torch.set_num_threads(options.threads)
    task: Any = "classify" if kind == "encoder" else "generate"
    base = bases.load(BASES[kind], task=task, num_labels=LABELS if kind == "encoder" else None, dtype="float32")
    workspace = Workspace(folder / "store")
    info = BaseInfo(BASES[kind], base.fingerprint, base.family.name)
    for name, adapter in adapters(base.model, task, ADAPTERS).items():
        if name.startswith("a"):
            save_bundle(replace(adapter, base=info), folder / name)
            workspace.store.put(name, folder / name)
            workspace.promote(f"{name}@1", "production")
    draw = random.Random(options.seed)
    words = sorted(word for word in base.tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 3)
    weights = [1 / (place + 1) for place in range(ADAPTERS)]
    whose = draw.choices(range(ADAPTERS), weights, k=count)
    return [(f"a{own}", " ".join(draw.choices(words, k=draw.randint(*WORDS[kind])))) for own in whose]


def one_batch(kind: str, folder: Path, asked: Sequence[Asked], options: argparse.Namespace) -> dict[str, float]:
    """The same requests to the engine by itself, all at once, everything loaded."""
    from turret.engine import Limits, SamplingParams
    from turret.workspace import Workspace

    task = "classify" if kind == "encoder" else "generate"
    settings = None if kind == "encoder" else SamplingParams(max_tokens=TOKENS, temperature=0.0)
    limits = Limits(queue_tokens=1 << 24)
    with Workspace(folder / "store").engine(BASES[kind], limits=limits, dtype=options.dtype) as engine:
        for number in range(ADAPTERS):
            engine.warm(f"a{number}@production")
        for text in asked[:16]:
            engine.submit(task, text[1], f"{text[0]}@production", settings).result()
        began = time.perf_counter()
        tickets = [engine.submit(task, text, f"{name}@production", settings) for name, text in asked]
        answers = [ticket.result() for ticket in tickets]
        seconds = time.perf_counter() - began
    read = sum(answer["prompt_tokens"] for answer in answers)
    return {"seconds": seconds, "prompt_tokens": read, "tokens": sum(answer.get("tokens", 0) for answer in answers)}


async def all_clients(url: str, kind: str, asked: Sequence[Asked], options: argparse.Namespace) -> dict[str, Any]:
    """Every client asks the next that nobody asked yet, until all are asked or the time is over."""
    import turret

    todo = iter(asked)
    seconds: list[float] = []
    used = {"prompt_tokens": 0, "tokens": 0}

    async with turret.AsyncClient(url) as client:

        async def ask(name: str, text: str) -> Mapping[str, Any]:
            if kind == "encoder":
                return (await client.classify(text, name)).body
            return (await client.complete(text, name, max_tokens=TOKENS, temperature=0)).body

        async def one() -> None:
            for name, text in todo:
                if time.perf_counter() - began > options.seconds:
                    return
                at = time.perf_counter()
                usage = (await ask(name, text))["usage"]
                seconds.append(time.perf_counter() - at)
                used["prompt_tokens"] += usage["prompt_tokens"]
                used["tokens"] += usage.get("completion_tokens") or 0

        for name, text in asked[:8]:
            await ask(name, text)  # whatever is only slow once
        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(options.clients)))
        took = time.perf_counter() - began
    return {"seconds": seconds, "took": took, **used}


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        settings, offline = run["settings"], run["offline"]
        p50, p95, p99 = (1e3 * _quantile(run["seconds"], share) for share in (0.5, 0.95, 0.99))
        rate, alone = run["requests"] / run["took"], run["asked"] / offline["seconds"]
        share = _tokens(run, run["took"]) / _tokens(offline, offline["seconds"])
        rows.append([
            f"{settings['kind']}, {settings['dtype']}, {settings['clients']} clients, {settings['threads']} threads",
            run["requests"], f"{p50:.0f}", f"{p95:.0f}", f"{p99:.0f}", f"{rate:.1f}", f"{alone:.1f}", f"{share:.2f}",
        ])  # fmt: skip
    header = ["", "requests", "p50 ms", "p95 ms", "p99 ms", "requests/s", "offline requests/s", "share of its tokens/s"]
    return record.table(header, rows)


def _tokens(counts: Mapping[str, Any], seconds: float) -> float:
    return float(counts["prompt_tokens"] + counts["tokens"]) / seconds


def _quantile(seconds: Sequence[float], share: float) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[round(100 * share) - 1]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--kinds", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="what this processor multiplies quickly")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1024, help="a quarter as many for the decoder")
    parser.add_argument("--seconds", type=float, default=90.0, help="most that clients ask")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
