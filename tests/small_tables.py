"""Small tables on disk, and the shortest way to read them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from turret.data import Dataset
from turret.data.dataset import read_dataset
from turret.recipe import Data, Task
from turret.tasks import schemas

POLES = [{"text": f"film {i}", "label": "good" if i % 2 else "bad"} for i in range(20)]
NEWS = [{"document": f"article {i}", "summary": f"headline {i}"} for i in range(20)]


def films(text: str = "text", label: str = "label") -> list[dict[str, str]]:
    """32 sentences on films in columns of these names, half of them good."""
    words = (("dull story", "bad"), ("great film", "good"))
    return [{text: f"{words[row % 2][0]}, number {row}", label: words[row % 2][1]} for row in range(32)]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **settings)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(source: Path | str, kind: Any = None, seed: int = 42, *, multi_label: bool = False, **fields: Any) -> Dataset:
    return read_dataset(Data(source=str(source), **fields), schemas(Task(kind=kind, multi_label=multi_label)), seed)


def labelled(labels: Iterable[Any]) -> list[dict[str, Any]]:
    """A row for each label."""
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
