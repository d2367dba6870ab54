"""Trainings as the store recorded them: the database row, the recipe, the loss curve.

A store by URL has copies of recipe and curve, so they can be read on every machine.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from turret.errors import NotFound
from turret.store import Store
from turret.store.runs import RunRow
from turret.timestamp import timestamp

if TYPE_CHECKING:
    from turret.compare.results import RunReport
    from turret.train.curve import RunCurve, StepRecord

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", re.ASCII)


class FullRun(RunRow):
    """A run with its recipe, and the time of its last step if it ran here."""

    recipe: str | None
    touched: str | None


def run(store: Store, run_id: str) -> FullRun:
    """The row, with the recipe as TOML and the time of the last step. Raises NotFound."""
    row = store.run(run_id)
    recipe = store.training_runs().recipe(run_id) if _ID.fullmatch(run_id) else None
    return {**row, "recipe": recipe, "touched": _changed(store, run_id)}


def curve(store: Store, run_id: str, most: int) -> RunCurve:
    """About `most` of the run's steps, evenly spaced, and every step with metrics. Raises NotFound."""
    from turret.train.curve import RunCurve

    store.run(run_id)
    records = every_step(store, run_id)
    every = max(1, -(-len(records) // max(most, 1)))
    return RunCurve(
        [
            record
            for place, record in enumerate(records)
            if place % every == 0 or place == len(records) - 1 or record.metrics is not None
        ]
    )


def report(store: Store, run_id: str) -> RunReport:
    """What its version got right and wrong on held-out examples. Raises NotFound."""
    from turret.compare.results import RunReport

    store.run(run_id)
    content = _file(store, run_id, "report.json")
    if content is None:
        raise NotFound(
            f"run {run_id} has no report: a training that has finished with held-out examples has one; "
            "`turret evaluate VERSION DATA` measures a version on other data"
        )
    return RunReport.from_json(content)


def every_step(store: Store, run_id: str) -> list[StepRecord]:
    """All records of the run's curve, so far as they are here or in the store."""
    from turret.train.curve import parse_curve

    return list(parse_curve(_file(store, run_id, "curve.jsonl") or b""))


def _file(store: Store, run_id: str, name: str) -> bytes | None:
    """A file of a run. An invalid id has none."""
    return store.training_runs().file(run_id, name) if _ID.fullmatch(run_id) else None


def _changed(store: Store, run_id: str) -> str | None:
    """The time of the last step: here, or when the curve was last copied to the store."""
    path = f"runs/{run_id}/curve.jsonl"
    copies = [each.changed for each in store.artifacts.listed(path)]
    return max([each for each in (_modified(store.root / path), *copies) if each], default=None)


def _modified(path: Path) -> str | None:
    try:
        return timestamp(path.stat().st_mtime, "seconds")
    except OSError:
        return None
