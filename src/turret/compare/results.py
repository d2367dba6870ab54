"""The result of one training of a comparison, as its process wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from turret.compare.design import Cell
from turret.compare.evidence import Array
from turret.json_types import JsonMapping, JsonObject

Output = str | Sequence[str]  # a text, a label, or the labels of a multi-label task


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One cell that has run."""

    spec: str
    seed: int
    fraction: float
    recipe: str  # TOML
    kind: str  # of the task
    version: str | None  # None: the bare base
    digest: str | None = None
    run: str | None = None
    base: JsonMapping  # id, fingerprint
    lr: float | None = None
    metrics: JsonMapping  # on the test examples
    held: JsonMapping  # split -> metrics, as they were stored with the version
    answers: Sequence[Output]  # for each test example
    scores: Array  # (N,): right or wrong, or ROUGE-L
    parameters: Mapping[str, int]
    timing: Mapping[str, float] = field(default_factory=dict)  # empty: nothing was trained
    memory: JsonMapping = field(default_factory=dict)
    bundle_bytes: int
    latency: Mapping[str, float]
    forgetting: Mapping[str, float] | None
    best: JsonMapping | None = None  # the best evaluation during training
    wall_seconds: float
    notes: Sequence[str]
    losses: Sequence[float] = ()  # of training, means over equal stretches
    guess: float | None = None  # mean score of outputs against the references of other texts
    said: str = ""  # how a row that trains nothing answers, in one sentence
    warnings: Sequence[str] = ()  # of the training, a sentence each: why not to trust its version
    made: JsonMapping | None = None  # date, device, threads, precision, versions

    @classmethod
    def of(cls, cell: Cell, written: JsonMapping) -> CellResult:
        """The result of a cell, from the JSON that its process wrote."""
        known = {each.name for each in fields(cls)}
        values: JsonObject = {name: value for name, value in written.items() if name in known}
        values |= {"spec": cell.candidate.spec, "seed": cell.seed, "fraction": cell.fraction}
        values |= {"recipe": cell.recipe.to_toml(), "held": written.get("stored_metrics", {})}
        return cls(**values | {"scores": np.asarray(written["scores"], dtype=float)})


def made_with(results: Iterable[CellResult]) -> JsonObject:
    """Dates (`from`, `to`), device and versions of the trainings; a list of values if they differ."""
    records = [each.made for each in results if each.made]
    if not records:
        return {}
    dates = sorted(str(each["date"]) for each in records)
    summary: JsonObject = {"from": dates[0], "to": dates[-1]}
    for key in records[0]:
        if key != "date":
            values = {repr(each.get(key)): each.get(key) for each in records}
            summary[key] = list(values.values()) if len(values) > 1 else records[0][key]
    return summary
