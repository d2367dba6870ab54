"""What a comparison has on disk, so that a killed one goes on: a folder a cell, its result whole or not there.

Under the store's root, `comparisons/<name>-<digest of recipe and data>/`:

- `lock`: held by the process that conducts the comparison
- `cells/<key>/request.json`: what the process of that cell is asked
- `cells/<key>/recipe.toml`, `plan.json`: written by it before its first step
- `cells/<key>/result.json`: written beside and renamed, once the version is stored and everything is measured
- `cells/<key>/failed.json`: why it came to no result; the next sitting tries again
- `report.html`, `report.md`, `report.json`: of all results so far

Findings on control lie alike under `controls/`, with what its classifier learns from in `references/`.

A cell's key is made of its recipe, so more methods, seeds or fractions later use what is there. Refuses to know what a
result means.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from turret.disk import sync
from turret.errors import StoreError
from turret.recipe import Recipe

FORMAT = 1


def folder_of(root: Path, recipe: Recipe, data_digest: str, room: str = "comparisons") -> Path:
    """Where the comparison of methods on this recipe's base, data and training lives: the method is left out of it."""
    same = recipe.with_overrides({"method": "head", "train.lr": "none"})
    same = same.model_copy(update={"train": same.train.model_copy(update={"init_from": None})})
    digest = hashlib.sha256(f"{FORMAT}\n{same.to_toml()}\n{data_digest}".encode()).hexdigest()
    return root / room / f"{recipe.name}-{digest[:10]}"


def write(path: Path, value: Any) -> None:
    """One JSON file, whole or not there."""
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(
            f"{path.name} of the comparison cannot be written to {path.parent}: {reason}: make room"
        ) from None


def read(path: Path) -> dict[str, Any] | None:
    """The file, or None where there is none; raises StoreError for one that is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read ({type(error).__name__}): delete it, and that run is made again"
        ) from None
    if not isinstance(value, dict):
        raise StoreError(f"{path} is not an object: delete it, and that run is made again")
    return value
