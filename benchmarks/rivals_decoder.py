"""Claim: sixteen different LoRAs decode several times faster in one batch than by vLLM on the same processor.

SmolLM2-135M in bfloat16, 16 prompts of 60 tokens (beginnings of BBC articles), 64 new tokens each, greedy, two threads.
Turret's engine and vLLM answer the same token ids, with the bare base and with a LoRA (r 8, all linear layers) of its
own for every prompt; both read the LoRAs from the same folders in PEFT's format. vLLM runs in three processes:

- `vllm`: tcmalloc and libiomp preloaded and threads bound to processors, as its manual asks, engine and worker in one
  process, LoRA off. It has the bare base alone.
- `vllm LoRA`: the same with `enable_lora`.
- `vllm stock LoRA`: as `pip install` and its own defaults leave it.

Every side is a process of its own; they take turns, round after round, with a pause in which the last one falls asleep.
A ratio is a rival's time over Turret's of the same round.

Beside speed: how well each side computes. Every token that a side chose is held against PEFT in float32 given the same
tokens before it: the share that is PEFT's own choice, and by how much the logarithm of its probability is lower.

    python benchmarks/rivals_decoder.py --setup         once: vLLM's environment, 4 GB
    python benchmarks/rivals_decoder.py                 some minutes
    python benchmarks/rivals_decoder.py --report
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import record
import rival_sides
import rivals
import side
from serve_sides import BASES, Shelf, adapters, use_threads

NAME = "rivals_decoder"
CLAIM = "sixteen different LoRAs decode several times faster in one batch than by vLLM on the same processor"
DTYPE, PROMPT = "bfloat16", 60
STRENGTH = 0.1  # of the random LoRAs, so that texts stay texts
BARE, DIFFERENT = "bare", "different"
TURRET, VLLM, LORA, STOCK = "turret", "vllm", "vllm LoRA", "vllm stock LoRA"
PAUSE = 1.5  # seconds; vLLM's worker waits awake for one


def main() -> None:
    options = _options()
    if options.worker is not None:
        work(json.loads(options.worker))
    elif options.setup:
        rivals.set_up(options.venvs, "vllm")
    else:
        if not options.report:
            run = measure(options)
            if options.quick:
                print(report([run]))
            else:
                record.keep(NAME, CLAIM, run)
        print(report(kept()))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rounds = options.rounds or (2 if options.quick else 7)
    prompts, tokens = (4, 16) if options.quick else (16, 64)
    settings = {
        "dtype": DTYPE, "rounds": rounds, "threads": options.threads, "seed": options.seed, "prompts": prompts,
        "prompt_tokens": PROMPT, "tokens": tokens,
    }  # fmt: skip
    vllm = commands(options, prompts, tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def own(side: str) -> tuple[list[str], dict[str, str]]:
            words = {**settings, "side": side, "folder": name}
            return rivals.command(__file__, words), rivals.environment(options.threads)

        with rivals.started({"prepare": own("prepare")}, folder) as sides:
            model = sides["prepare"].facts["model"]
        started = {TURRET: own(TURRET), **vllm(name, model)}
        with rivals.started({each: started[each] for each in options.sides}, folder) as sides:
            for who, each in sides.items():
                for way in each.facts["ways"]:
                    rivals.answered(each, way, "check", folder / f"answers {who}, {way}.json")
            times = rivals.in_turns(sides, rounds, PAUSE)
            found = {who: {**each.facts, "dtype": DTYPE, "ways": times[who]} for who, each in sides.items()}
        with rivals.started({"score": own("score")}, folder) as sides:
            scores = sides["score"].facts["scores"]
    for who, ways in scores.items():
        found[who]["scores"] = ways
    return {"settings": settings, "sides": found, "machine": record.machine(options.threads)}


def commands(
    options: argparse.Namespace, prompts: int, tokens: int
) -> Callable[[str, str], dict[str, tuple[list[str], dict[str, str]]]]:
    """vLLM's processes. What its manual asks is in the environment before a process starts."""
    interpreter, preload = rivals.python(options.venvs, "vllm"), rivals.preloaded(options.venvs)
    processors = ",".join(str(each) for each in sorted(os.sched_getaffinity(0))[: options.threads])
    quiet = {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CACHE_ROOT": str(options.venvs / "vllm" / "cache"), "PYTHONPATH": "",
    }  # fmt: skip
    tuned = {
        "LD_PRELOAD": preload, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": processors,
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{processors}]", "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0",
    }  # fmt: skip

    def made(folder: str, model: str) -> dict[str, tuple[list[str], dict[str, str]]]:
        loras = [str(Path(folder) / "adapters" / f"a{number}") for number in range(prompts)]
        words = {
            "rival": "vllm", "folder": folder, "dtype": DTYPE, "threads": options.threads, "model": model,
            "tokens": tokens,
        }  # fmt: skip
        plain = rivals.command(__file__, words, interpreter)
        adapted = rivals.command(__file__, {**words, "adapters": loras}, interpreter)
        around = rivals.environment(options.threads, **quiet)
        return {VLLM: (plain, {**around, **tuned}), LORA: (adapted, {**around, **tuned}), STOCK: (adapted, around)}

    return made


# --- processes of ours -----------------------------------------------------------------------------------------------


def work(errand: Mapping[str, Any]) -> None:
    if "rival" in errand:
        rival_sides.work(errand)
        return
    use_threads(errand["threads"])
    says = side.answers_alone()
    folder = Path(errand["folder"])
    if errand["side"] == "prepare":
        side.take_turns({}, {}, says, {"model": prepare(errand, folder)})
    elif errand["side"] == "score":
        side.take_turns({}, {}, says, {"scores": score(folder)})
    else:
        turret(errand, folder, says)


def prepare(errand: Mapping[str, Any], folder: Path) -> str:
    """Write the prompts and the LoRAs, and tell where the base lies."""
    from train_sides import articles

    from turret import bases
    from turret.bundles import save_bundle

    base = bases.load(BASES["decoder"], task="generate", dtype=DTYPE)
    texts = [text for text, _ in articles()]
    random.Random(errand["seed"]).shuffle(texts)
    encoded = (base.tokenizer(text)["input_ids"][:PROMPT] for text in texts)
    rows = [row for row in encoded if len(row) == PROMPT][: errand["prompts"]]
    (folder / "rows.json").write_text(json.dumps({"speed": rows, "check": rows}), encoding="utf-8")
    (folder / "adapters").mkdir()
    for number, adapter in enumerate(loras(base.model, len(rows))):
        save_bundle(adapter, folder / "adapters" / f"a{number}")
    (folder / "model.txt").write_text(str(base.folder), encoding="utf-8")
    return str(base.folder)


def loras(model: Any, count: int) -> list[Any]:
    made = adapters(model, "generate", count)
    for number in range(count):
        for name, value in made[f"a{number}"].tensors.items():
            if ".lora_B" in name:
                value.mul_(STRENGTH)
    return [made[f"a{number}"] for number in range(count)]


def turret(errand: Mapping[str, Any], folder: Path, says: Any) -> None:
    from importlib.metadata import version

    from turret import bases
    from turret.engine import Engine, Limits, SamplingParams

    base = bases.load(BASES["decoder"], task="generate", dtype=DTYPE)
    base.model.generation_config.min_new_tokens = errand["tokens"]  # as many tokens on every side, whatever they are
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    shelf = Shelf()
    shelf.adapters = {f"a{number}": folder / "adapters" / f"a{number}" for number in range(errand["prompts"])}
    with Engine(base, shelf, Limits(running=64, slots=64)) as engine:

        def way(names: Sequence[str | None]) -> side.Way:
            def generate(given: Sequence[Sequence[int]]) -> list[list[int]]:
                told = 0 if given is rows["check"] else None  # token ids are told beside probabilities alone
                options = SamplingParams(max_tokens=errand["tokens"], temperature=0.0, logprobs=told)
                tickets = [
                    engine.submit("generate", row, name, options) for row, name in zip(given, names, strict=True)
                ]
                answers = [ticket.result() for ticket in tickets]
                if any(answer["tokens"] != errand["tokens"] for answer in answers):
                    raise SystemExit("an answer ended before its last token: take another --seed")
                return [[each["id"] for each in answer.get("logprobs", ())] for answer in answers]

            return generate

        ways = {BARE: way([None] * errand["prompts"]), DIFFERENT: way(list(shelf.adapters))}
        side.take_turns(ways, rows, says, {"package": "turret", "version": version("turret")})


def score(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Side -> way -> {"same", "lost"}: PEFT in float32 judges every token of every answer, given those before it."""
    import peft
    import torch
    import transformers

    where = (folder / "model.txt").read_text(encoding="utf-8")
    base = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    model = peft.PeftModel.from_pretrained(base, str(folder / "adapters" / "a0"), adapter_name="a0")
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["check"]
    for number in range(1, len(rows)):
        model.load_adapter(str(folder / "adapters" / f"a{number}"), adapter_name=f"a{number}")
    model.eval()
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for file in sorted(folder.glob("answers *.json")):
        who, _, way = file.stem.removeprefix("answers ").partition(", ")
        same, lost = [], []
        for number, (prompt, answer) in enumerate(zip(rows, json.loads(file.read_text(encoding="utf-8")), strict=True)):
            model.set_adapter(f"a{number}")
            with torch.inference_mode():
                ids = torch.tensor([[*prompt, *answer]])  # (1, T)
                if way == BARE:
                    with model.disable_adapter():
                        logits = model(input_ids=ids).logits
                else:
                    logits = model(input_ids=ids).logits
            told = logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # (T_new, V)
            best, chosen = told.max(-1), told.gather(1, torch.tensor(answer)[:, None])[:, 0]
            same += (best.indices == torch.tensor(answer)).tolist()
            lost += (best.values - chosen).tolist()
        scores.setdefault(who, {})[way] = {"same": statistics.fmean(same), "lost": statistics.fmean(lost)}
    return scores


# --- what the kept runs say ------------------------------------------------------------------------------------------


def kept() -> list[dict[str, Any]]:
    """The newest run on each processor."""
    return record.newest(record.load(NAME), lambda run: run["settings"]["dtype"])


def report(runs: Sequence[Mapping[str, Any]], where: Callable[[Mapping[str, Any]], str] | None = None) -> str:
    """A row a kind of work and a way to run vLLM."""
    rows = []
    for run in runs:
        ours, total = run["sides"][TURRET], run["settings"]["prompts"] * run["settings"]["tokens"]
        for way, name in ((DIFFERENT, f"{run['settings']['prompts']} LoRAs"), (BARE, "bare base")):
            for who, each in run["sides"].items():
                if who != TURRET and way in each["ways"]:
                    scores = [each["scores"][way], ours["scores"][way]]
                    speeds = [total / statistics.median(side["ways"][way]) for side in (each, ours)]
                    rows.append([
                        where(run) if where else run["machine"]["device"],
                        f"{name}, {run['settings']['dtype']}",
                        f"{who.replace('vllm', 'vLLM')}, {each['version']}",
                        *(f"{speed:.0f}" for speed in speeds),
                        record.shown(record.ratio(each["ways"][way], ours["ways"][way])),
                        ", ".join(f"{score['same']:.1%}" for score in scores),
                        ", ".join(f"{score['lost']:.4f}" for score in scores),
                        run["machine"]["at"][:10],
                    ])  # fmt: skip
    header = [
        "processor", "work", "rival", "tokens/s: rival", "Turret", "Turret is faster",
        "tokens as float32 chooses: rival, Turret", "log probability lost: rival, Turret", "measured",
    ]  # fmt: skip
    return record.table(header, rows) if rows else ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=[VLLM, LORA, STOCK], default=[VLLM, LORA, STOCK])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    rivals.add_options(parser)
    options = parser.parse_args()
    options.sides = [TURRET, *options.sides]
    return options


if __name__ == "__main__":
    main()
