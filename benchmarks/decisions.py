"""Claim: many questions about one text in one request take much less time than as many requests to `/v1/classify`.

A `turret serve` process on loopback with 32 different adapters that classify, on one base, and panels of 1, 8 and 32
of them: LoRAs, and heads alone, for which the base reads a text once. The same adapters are asked in three ways that
take turns, text by text: one request to `/v1/decisions`; as many requests to `/v1/classify` at once; as many one
after another. Then the first two by 8 clients at once, for the throughput. Answers of all ways are compared.

    python benchmarks/decisions.py              a few minutes
    python benchmarks/decisions.py --report
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
from serve_load import ADAPTERS, filled, serving

import turret
from turret.bundles import read_bundle, save_bundle
from turret.workspace import Workspace

NAME = "decisions"
CLAIM = "8 questions about one text in one request take less than half the time of 8 requests at once"
COUNTS = (1, 8, 32)  # questions
METHODS = {"lora": "a", "head": "h"}  # the letter of their names
WAYS = ("one request", "requests at once", "requests in turn")
Ask = Callable[[str, int], Awaitable[list[dict[str, float]]]]  # text, questions -> probabilities by adapter


def main() -> None:
    options = _options()
    if not options.report:
        with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
            found = measure(Path(folder), options)
        settings = {
            "dtype": options.dtype,
            "threads": options.threads,
            "texts": options.texts,
            "clients": options.clients,
        }
        record.keep(NAME, CLAIM, {"settings": settings, **found, "machine": record.machine(options.threads)})
    print(report(record.newest(record.load(NAME), lambda run: repr(run["settings"]))))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    texts = [text for _, text in filled("encoder", folder, options.texts, options)]
    workspace = Workspace(folder / "store")
    for number in range(ADAPTERS):
        with_lora = read_bundle(folder / f"a{number}")
        save_bundle(replace(with_lora, method=turret.Head(), tensors={}), folder / f"h{number}")
        workspace.store.put(f"h{number}", folder / f"h{number}")
        workspace.promote(f"h{number}@1", "production")
    for letter in METHODS.values():
        for count in COUNTS:
            names = [f"{letter}{number}" for number in range(count)]
            workspace.panels.create(f"p{letter}{count}", {name: name for name in names})
    labels = workspace.resolve("a0").part("task")["labels"]
    with serving("encoder", folder, options) as url:
        return {each: asyncio.run(all_ways(url, letter, texts, labels, options)) for each, letter in METHODS.items()}


async def all_ways(
    url: str, letter: str, texts: Sequence[str], labels: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    choices = [{"value": label} for label in labels]

    async with turret.AsyncClient(url) as client:

        async def one_request(text: str, count: int) -> list[dict[str, float]]:
            questions = [{"type": "choice", "name": f"{letter}{number}", "choices": choices} for number in range(count)]
            found = await client.decide(text, questions, f"p{letter}{count}")
            return [{each["value"]: each["probability"] for each in one["probabilities"]} for one in found["answers"]]

        async def classified(text: str, number: int) -> dict[str, float]:
            return (await client.classify(text, f"{letter}{number}")).probabilities[0]

        async def at_once(text: str, count: int) -> list[dict[str, float]]:
            return await asyncio.gather(*(classified(text, number) for number in range(count)))

        async def in_turn(text: str, count: int) -> list[dict[str, float]]:
            return [await classified(text, number) for number in range(count)]

        ways: dict[str, Ask] = dict(zip(WAYS, (one_request, at_once, in_turn), strict=True))
        for ask in ways.values():
            await ask(texts[0], COUNTS[-1])  # whatever is only slow once
        latency: dict[str, dict[str, list[float]]] = {}
        for count in COUNTS:
            latency[str(count)] = {way: [] for way in WAYS}
            for place, text in enumerate(texts):
                answers = []
                for turn in range(len(WAYS)):
                    way = WAYS[(turn + place) % len(WAYS)]
                    began = time.perf_counter()
                    answers.append(await ways[way](text, count))
                    latency[str(count)][way].append(time.perf_counter() - began)
                _check(answers)
        rate = {
            str(count): {way: await throughput(ways[way], texts, count, options) for way in WAYS[:2]}
            for count in COUNTS
        }
    return {"seconds": latency, "texts_per_second": rate}


async def throughput(ask: Ask, texts: Sequence[str], count: int, options: argparse.Namespace) -> float:
    """Texts a second, of so many clients at once."""
    todo = iter(texts)

    async def client() -> None:
        for text in todo:
            await ask(text, count)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(options.clients)))
    return len(texts) / (time.perf_counter() - began)


def _check(answers: Sequence[Sequence[Mapping[str, float]]]) -> None:
    """Every way gives the same probabilities, as far as rows that share a pass may round otherwise."""
    for first, *others in zip(*answers, strict=True):
        for other in others:
            assert first.keys() == other.keys()
            assert all(math.isclose(first[label], other[label], abs_tol=0.02) for label in first), (first, other)


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        settings = run["settings"]
        for count, seconds in run["seconds"].items():
            one, once, turn = (seconds[way] for way in WAYS)
            rates = run["texts_per_second"][count]
            rows.append([
                f"{count} questions, {settings['method']}, {settings['dtype']}, {settings['threads']} threads",
                *(f"{1e3 * statistics.median(each):.1f}" for each in (one, once, turn)),
                record.shown(record.ratio(once, one)), record.shown(record.ratio(turn, one)),
                *(f"{rates[way]:.1f}" for way in WAYS[:2]),
            ])  # fmt: skip
    header = ["", "one request, ms", "at once, ms", "in turn, ms", "one against at once", "one against in turn"]
    return record.table([*header, "texts/s, one request", "texts/s, at once"], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--clients", type=int, default=8, help="at once, for the throughput")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
