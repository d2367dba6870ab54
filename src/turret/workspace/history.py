"""What the store recorded of earlier work: trainings (row, recipe, loss curve) and reports of comparisons.

A store by URL has copies of recipe and curve, so they can be read on every machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turret.errors import NotFound, StoreError
from turret.json_types import JsonObject
from turret.store import Store
from turret.store.runs import RunRow
from turret.timestamp import timestamp

if TYPE_CHECKING:
    from turret.compare.results import RunReport
    from turret.train.curve import RunCurve, StepRecord


class FullRun(RunRow):
    """A run with its recipe, and the time of its last step if it ran here."""

    recipe: str | None
    touched: str | None


def run(store: Store, run_id: str) -> FullRun:
    """The row, with the recipe as TOML and the time of the last step. Raises NotFound."""
    row = store.run(run_id)
    return {**row, "recipe": store.training_runs().recipe(run_id), "touched": _last_step_time(store, run_id)}


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
    content = store.training_runs().file(run_id, "report.json")
    if content is None:
        raise NotFound(
            f"run {run_id} has no report: a training that has finished with held-out examples has one; "
            "`turret evaluate VERSION DATA` measures a version on other data"
        )
    return RunReport.from_json(content)


def every_step(store: Store, run_id: str) -> list[StepRecord]:
    """All records of the curve of a run that the store has, so far as they are here or in the store."""
    from turret.train.curve import parse_curve

    return list(parse_curve(store.training_runs().file(run_id, "curve.jsonl") or b""))


def _last_step_time(store: Store, run_id: str) -> str | None:
    """The time of the last step: here, or when the curve was last copied to the store."""
    path = f"runs/{run_id}/curve.jsonl"
    copies = [each.changed for each in store.artifacts.list_files(path)]
    return max([each for each in (_modified_time(store.root / path), *copies) if each], default=None)


def _modified_time(path: Path) -> str | None:
    try:
        return timestamp(path.stat().st_mtime, "seconds")
    except OSError:
        return None


FOLDERS = {"comparisons": "comparison", "controls": "control"}  # folder in the store -> kind of report
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,220}", re.ASCII)


def list_reports(store: Store) -> Sequence[JsonObject]:
    """`key`, `kind`, `written` and the contents of report.json, newest first; an unreadable report has a `problem`."""
    reports = [
        {**_summary(key, written, content), "kind": kind}
        for folder, kind in FOLDERS.items()
        for key, written, content in (
            _copied_reports(store, folder) if store.artifacts.copies else _local(store, folder)
        )
        if _KEY.fullmatch(key) and _seen(store, key)
    ]
    return sorted(reports, key=lambda each: (each["written"], each["key"]), reverse=True)


def read_report(store: Store, key: str) -> str:
    """The HTML of a report. Raises NotFound."""
    known = _KEY.fullmatch(key) and _seen(store, key)
    names = [f"{folder}/{key if known else '-'}/report.html" for folder in FOLDERS]
    try:
        found = (_content(store, name) for name in names)
        content = next((each for each in found if each is not None), None)
        if content is not None:
            return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise StoreError(
            f"the report of {key} cannot be read ({type(error).__name__}): run `turret compare` again to rewrite it"
        ) from None
    raise NotFound(f"no comparison {ascii(key)[:60]}: `turret compare` makes one")


def _local(store: Store, folder: str) -> Iterator[tuple[str, str, bytes | OSError]]:
    """Key, time and content of each report in a folder store."""
    for path in (store.home / folder).glob("*/report.json"):
        try:
            yield path.parent.name, timestamp(path.stat().st_mtime, "seconds"), path.read_bytes()
        except OSError as error:
            yield path.parent.name, "", error


def _copied_reports(store: Store, folder: str) -> Iterator[tuple[str, str, bytes]]:
    """Key, time and content of each report in a store by URL."""
    for each in store.artifacts.list_files(f"{_place(store)}{folder}/"):
        if each.path.endswith("/report.json") and (content := store.artifacts.read(each.path)) is not None:
            yield each.path.split("/")[-2], each.changed, content


def _content(store: Store, name: str) -> bytes | None:
    if store.artifacts.copies:
        return store.artifacts.read(f"{_place(store)}{name}")
    path = store.home / name
    return path.read_bytes() if path.exists() else None


def _place(store: Store) -> str:
    """The folder of this tenant's comparisons, under the store's root."""
    return "" if store.home == store.root else f"{store.home.relative_to(store.root).as_posix()}/"


def _seen(store: Store, key: str) -> bool:
    """Whether this store's access sees the report: all names in its key, which ends in 10 digits of a digest."""
    names = re.sub("-[0-9a-f]{10}$", "", key).split("+")
    return all(store.access.sees_report(name) for name in names)


def _summary(key: str, written: str, content: bytes | OSError) -> JsonObject:
    try:
        if isinstance(content, OSError):
            raise content
        report = json.loads(content.decode("utf-8"))
        if not isinstance(report, dict):
            raise ValueError
    except (OSError, ValueError) as error:
        return {"key": key, "written": "", "problem": f"its report cannot be read ({type(error).__name__})"}
    return {**report, "key": key, "written": written, "problem": None}
