"""Claim: any mixture of adapters in one batch costs little more than the bare base, and far less than PEFT's way.

An encoder (all-MiniLM-L6, 32 texts of 64-256 tokens) and a decoder (SmolLM2-135M, 16 prompts of 60 tokens, greedy):
float32 and bfloat16, LoRA r=8 on all linear layers. One process does everything in turns, round after round, on the
same token ids; its threads wait as those of `turret serve` do, unless GOMP_SPINCOUNT says otherwise. A speed is the
time of the engine's bare base over a side's of the same round; the median over the rounds, of which those with a rival
are a third as many. Texts are drawn token by token: speed does not read them. The encoder's bare base is a head alone,
for it answers nothing without one.

    python benchmarks/serve_speed.py            a quarter of an hour (make bench-serve)
    python benchmarks/serve_speed.py --kinds encoder --dtypes float32
    python benchmarks/serve_speed.py --quick    a few minutes: fewer rounds, 8 texts of each kind, 10 and 20 adapters
    python benchmarks/serve_speed.py --report
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import record
from serve_sides import (
    BASES,
    LABELS,
    Shelf,
    adapters,
    answered,
    by_peft,
    by_transformers,
    compared,
    first_answers,
    use_threads,
)

NAME = "serve_speed"
CLAIM = "a mixture of adapters costs little more than the bare base, and far less than PEFT's adapter_names"
BUCKET = 4
REPEATS = 9  # of every load
AT_ONCE = "turret load and answer"
STOCK = "peft padded float32"  # beside a bfloat16 engine
Side = Callable[[], None]


def main() -> None:
    options = _options()
    if not options.report:
        use_threads(options.threads)
        for kind in options.kinds:
            for dtype in options.dtypes:
                measured = measure(kind, dtype, options)
                settings = {"kind": kind, "dtype": dtype, "threads": options.threads, "quick": options.quick}
                run = {"settings": settings, **measured, "machine": record.machine(options.threads)}
                record.keep(NAME, CLAIM, run)
    print(report(record.newest(record.load(NAME), lambda run: repr(run["settings"]))))


def measure(kind: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    from turret import bases
    from turret.engine import Engine, Limits

    task: Any = "classify" if kind == "encoder" else "generate"
    count = 8 if options.quick else 32 if kind == "encoder" else 16
    tokens = 1 if kind == "encoder" else 8 if options.quick else 32
    labels = LABELS if task == "classify" else None
    source = bases.load(BASES[kind], task=task, num_labels=labels, dtype=dtype)
    rival = bases.load(BASES[kind], task=task, num_labels=labels, dtype=dtype).model
    if task == "generate":  # as many tokens on every side, whatever they are
        source.model.generation_config.min_new_tokens = tokens
    shelf = Shelf()
    shelf.adapters = adapters(source.model, task, count)
    generator = random.Random(options.seed)
    lengths = [generator.randint(64, 256) if kind == "encoder" else 60 for _ in range(count)]
    rows = [[generator.randrange(1000, 20_000) for _ in range(length)] for length in lengths]
    numbers = [shelf.adapters[f"a{number}"] for number in range(count)]
    ours = first_answers(source, numbers, rows)
    sizes = {"padded": count} | (
        {"bucketed": BUCKET} if kind == "encoder" else {}
    )  # a decoder's rows are of one length
    rounds = options.rounds or (3 if options.quick else 15 if kind == "encoder" else 5)
    slow_rounds = -(-rounds // 3)  # where the rival takes part
    with Engine(source, shelf, Limits(running=64, slots=2048)) as engine:
        sides: dict[str, Side] = {
            f"engine {name}": _bound(answered, engine, task, rows, names, tokens)
            for name, names in mixes(count).items()
        }
        times = in_turns(sides, rounds)
        bare = {"engine bare": sides["engine bare"]}
        bare |= {f"transformers {name}": _bound(by_transformers, rival, task, rows, None, size, tokens)
                 for name, size in sizes.items()}  # fmt: skip
        bare_times = in_turns(bare, slow_rounds)
        model, load = by_peft(rival, task, count)
        off = compared(model, numbers, rows, ours)
        names = [f"a{number}" for number in range(count)]
        with_peft = {name: sides[name] for name in ("engine bare", "engine all different")}
        with_peft |= {f"peft {name}": _bound(by_transformers, model, task, rows, names, size, tokens)
                      for name, size in sizes.items()}  # fmt: skip
        if kind == "encoder" and dtype != "float32":
            stock, _ = by_peft(
                bases.load(BASES[kind], task=task, num_labels=labels, dtype="float32").model, task, count
            )
            with_peft[STOCK] = _bound(by_transformers, stock, task, rows, names, count, tokens)
        peft_times = in_turns(with_peft, slow_rounds)
        with tempfile.TemporaryDirectory() as folder:
            most = 100 if kind == "encoder" else count
            loading = loads(engine, shelf, (model, load, most), task, Path(folder), options.loaded)
            more = 1000 if kind == "encoder" and not options.quick else 50  # a thousand of the decoder's are 5 or 10 GB
            memory = {
                **thousand(engine, shelf, Path(folder) / "ours", more),
                "base_bytes": source.bytes,
                "float32_base_bytes": sum(4 * each.numel() for each in source.model.parameters()),
            }
    beside = {"seconds_with_transformers": bare_times, "seconds_with_peft": peft_times}
    return {"seconds": times, **beside, "off": off, "loading": loading, "memory": memory}


def _bound(function: Callable[..., None], *arguments: Any) -> Side:
    return lambda: function(*arguments)


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


def loads(
    engine: Any, shelf: Shelf, rival: tuple[Any, Callable[[str], None], int], task: str, folder: Path,
    counts: Sequence[int],
) -> list[Any]:  # fmt: skip
    """Seconds from a file to loaded, then to a first answer, and to one of another adapter, with so many there.

    Whoever asks the engine for a version that is not there has it loaded and answered in one request: AT_ONCE, behind
    whatever the rival left in the caches.
    """
    import torch

    from turret.bundles import save_bundle

    model, load, most = rival
    save_bundle(shelf.adapters["a1"], folder / "ours")
    model.save_pretrained(str(folder / "theirs"), selected_adapters=["a1"], save_embedding_layers=False)
    where = str(folder / "theirs" / "a1")
    text, found = [[1000 + place for place in range(16)]], []
    for loaded in engine.loaded():
        engine.unload(loaded.version.partition("@")[0])
    theirs = list(model.peft_config)
    for name in theirs[min(counts) :]:
        model.delete_adapter(name)
    for count in counts:
        for number in range(len(engine.loaded()), count):
            shelf.adapters[f"x{number}"] = shelf.adapters["a0"]
            engine.warm(f"x{number}")
        seconds: dict[str, list[float]] = {}
        for turn in range(REPEATS):
            name = f"new{count}-{turn}"
            shelf.adapters[name] = folder / "ours"
            steps: dict[str, Side] = {
                "turret load": lambda own=name: engine.warm(own),  # type: ignore[misc]
                "turret answer": lambda own=name: answered(engine, task, text, [own], 1),  # type: ignore[misc]
                "turret switch": lambda: answered(engine, task, text, ["x0"], 1),
            }
            if count <= most:
                for number in range(len(model.peft_config), count):
                    load(f"x{number}")
                steps |= {
                    "peft load": lambda own=name: model.load_adapter(where, own, autocast_adapter_dtype=False),  # type: ignore[misc]
                    "peft answer": lambda own=name: _switched(model, own, torch.tensor(text)),  # type: ignore[misc]
                    "peft switch": lambda: _switched(model, "a0", torch.tensor(text)),
                }
            own = f"own{count}-{turn}"
            shelf.adapters[own] = folder / "ours"
            steps[AT_ONCE] = lambda own=own: answered(engine, task, text, [own], 1)  # type: ignore[misc]
            for step, work in steps.items():
                seconds.setdefault(step, []).append(_seconds(work))
            engine.unload(name)
            engine.unload(own)
            if count <= most:
                model.delete_adapter(name)
        found.append({"present": count, "seconds": seconds})
    return found


def _switched(model: Any, name: str, ids: Any) -> None:
    import torch

    model.set_adapter(name)
    with torch.inference_mode():
        model(input_ids=ids)


def _seconds(work: Side) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def thousand(engine: Any, shelf: Shelf, bundle: Path, count: int) -> dict[str, Any]:
    """Resident bytes that so many more adapters take, each loaded from its file; what is free is given back."""
    import psutil

    from turret import process

    this = psutil.Process()
    process.release_memory()
    before = this.memory_info().rss
    for number in range(count):
        shelf.adapters[f"m{number}"] = bundle
        engine.warm(f"m{number}")
    process.release_memory()
    return {"adapters": count, "bytes": this.memory_info().rss - before}


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in runs:
        settings, own = run["settings"], run["settings"]["kind"]
        what = f"{own}, {settings['dtype']}, {settings['threads']} threads{', quick' * settings['quick']}"
        lines.append(f"\n{what} ({run['machine']['device']})\n")
        rows = []
        for times in (run["seconds"], run["seconds_with_transformers"], run["seconds_with_peft"]):
            rows += [
                [name, f"{1e3 * statistics.median(each):.0f}", _share(times, name)] for name, each in times.items()
            ]
        lines.append(record.table(["side", "ms", "speed against the engine's bare base [least, most]"], rows))
        steps = (AT_ONCE, "turret load", "peft load", "turret answer", "peft answer", "turret switch", "peft switch")
        loading = [[at["present"], *(_ms(at["seconds"].get(step)) for step in steps)] for at in run["loading"]]
        lines.append(record.table(["adapters present", *(f"{step}, ms" for step in steps)], loading))
        memory = run["memory"]
        each = memory["bytes"] / memory["adapters"] / 1e6
        base = memory["base_bytes"] / 1e6
        lines.append(
            f"{memory['adapters']} more all-linear adapters: {each:.2f} MB each beside a base of {base:.0f} MB; "
            f"logits of up to {run['off']['largest']:.1f} differ from PEFT's alone by at most {run['off']['most']:.1e}"
        )
        if "peft_from_float64" in run["off"]:
            own, other = (run["off"][f"{side}_from_float64"] for side in ("turret", "peft"))
            lines.append(f"from the same numbers in float64: turret {own:.1e}, PEFT {other:.1e}")
        if "peft_eager_from_peft" in run["off"]:
            lines.append(f"PEFT with eager attention from PEFT: {run['off']['peft_eager_from_peft']:.1e}")
        lines.append(record.table(["goal", "must", "measured", ""], goals(run)))
    return "\n".join(lines)


def goals(run: Mapping[str, Any]) -> list[list[str]]:
    """Each goal that this run speaks of, and whether it is reached."""
    kind, dtype = run["settings"]["kind"], run["settings"]["dtype"]
    own, beside, memory = run["seconds"], run["seconds_with_peft"], run["memory"]
    different, rows = "engine all different", []

    def goal(name: str, must: float, got: float, unit: str = "x", most: bool = False) -> None:
        reached = got <= must if most else got >= must
        measured = f"{got:.2g}" if got < 0.01 else f"{got:.3g}"
        wanted = f"at {'most' if most else 'least'} {must:g}{unit}"
        rows.append([name, wanted, f"{measured}{unit}", "reached" if reached else "missed"])

    bare = 0.92 if kind == "encoder" else 0.85
    goal("speed, all different against the engine's bare base", bare, _ratio(own, "engine bare", different))
    goal("speed, all different against all the same", 0.97, _ratio(own, "engine same", different))
    if kind == "encoder":
        stock = STOCK if STOCK in beside else "peft padded"
        goal("speed against PEFT adapter_names, stock float32", 3, _ratio(beside, stock, different))
        goal(
            "speed against PEFT adapter_names, bucketed, same precision",
            1.8,
            _ratio(beside, "peft bucketed", different),
        )
        thousand = 1000 * memory["bytes"] / memory["adapters"] / memory["float32_base_bytes"]
        goal("memory of 1000 adapters against a float32 base", 7.5, thousand, most=True)
    else:
        goal("speed against PEFT adapter_names", 4, _ratio(beside, "peft padded", different))
    for at in run["loading"]:
        took = {step: statistics.median(each) for step, each in at["seconds"].items()}
        if "peft load" in took and at["present"] >= 100:
            theirs = took["peft load"] + took["peft answer"]
            ours = took.get(AT_ONCE, took["turret load"] + took["turret answer"])
            goal(
                f"speed of a load, {at['present']} others loaded, against PEFT",
                50,
                took["peft load"] / took["turret load"],
            )
            goal(f"speed of a load and its answer, {at['present']} others loaded, against PEFT", 50, theirs / ours)
    if dtype == "float32":
        goal("largest difference of the first answer to PEFT alone", 1e-5, run["off"]["most"], "", most=True)
    return rows


def _ratio(times: Mapping[str, Sequence[float]], slow: str, quick: str) -> float:
    return statistics.median(a / b for a, b in zip(times[slow], times[quick], strict=True))


def _share(times: Mapping[str, Sequence[float]], name: str) -> str:
    return record.shown(record.ratio(times["engine bare"], times[name]), 3, "")


def _ms(seconds: Sequence[float] | None) -> str:
    return "not measured" if seconds is None else f"{1e3 * statistics.median(seconds):.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--kinds", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.loaded = (10, 20) if options.quick else (10, 100, 500)
    return options


if __name__ == "__main__":
    main()
