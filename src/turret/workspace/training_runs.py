"""Trainings as the store recorded them: the database row, the recipe, the loss curve.

The folder of a run is on the machine that trained. On other machines its recipe and curve are missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from turret.json_types import JsonObject
from turret.store import Store

if TYPE_CHECKING:
    from turret.train import StepRecord

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", re.ASCII)


def run(store: Store, run_id: str) -> JsonObject:
    """The row, with the recipe as TOML and the time of the last step. Raises NotFound."""
    row = store.run(run_id)
    folder = _folder(store, run_id)
    return {**row, "recipe": _text(folder / "recipe.toml"), "touched": _changed(folder / "curve.jsonl")}


def curve(store: Store, run_id: str, most: int) -> Sequence[StepRecord]:
    """About `most` of the run's steps, evenly spaced, and every step with metrics. Raises NotFound."""
    from turret.train import read_curve

    store.run(run_id)
    records = list(read_curve(_folder(store, run_id) / "curve.jsonl"))
    every = max(1, -(-len(records) // max(most, 1)))
    return [
        record
        for place, record in enumerate(records)
        if place % every == 0 or place == len(records) - 1 or record.metrics is not None
    ]


def _folder(store: Store, run_id: str) -> Path:
    """The folder of a run. An invalid id gives a path that does not exist."""
    return store.root / "runs" / (run_id if _ID.fullmatch(run_id) else "-")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _changed(path: Path) -> str | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except OSError:
        return None
