"""Trainings as they lie in the store: the row, the recipe, the curve. Refuses to know how one is carried out.

A training's folder is on the machine that trained: elsewhere its recipe and curve are simply not there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turret.store import Store

if TYPE_CHECKING:
    from turret.train import StepRecord

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", re.ASCII)


def run(store: Store, run_id: str) -> dict[str, Any]:
    """The row, with the recipe as TOML and the time of the last step; raises NotFound."""
    found = store.run(run_id)
    folder = _folder(store, run_id)
    return {**found, "recipe": _text(folder / "recipe.toml"), "touched": _changed(folder / "curve.jsonl")}


def curve(store: Store, run_id: str, most: int) -> Sequence[StepRecord]:
    """Its steps, thinned to about so many; raises NotFound."""
    from turret.train import read_curve

    store.run(run_id)
    found = list(read_curve(_folder(store, run_id) / "curve.jsonl"))
    every = max(1, -(-len(found) // max(most, 1)))
    return [
        each
        for place, each in enumerate(found)
        if place % every == 0 or place == len(found) - 1 or each.metrics is not None
    ]


def _folder(store: Store, run_id: str) -> Path:
    """Where it lies; a name that is no run's leads nowhere."""
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
