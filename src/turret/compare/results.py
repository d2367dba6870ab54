"""What one training of a comparison gave, as the process that made it wrote it down. Knows numbers and words only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turret.compare.design import Cell
from turret.compare.evidence import Array


@dataclass(frozen=True)
class Result:
    """One cell that has run."""

    spec: str
    seed: int
    fraction: float
    recipe: str  # TOML
    kind: str  # of the task
    version: str | None  # None: the base alone
    digest: str | None
    run: str | None
    base: Mapping[str, Any]  # id, fingerprint
    lr: float | None
    metrics: Mapping[str, Any]  # on the test examples
    held: Mapping[str, Any]  # split -> metrics, as they were stored with the version
    answers: Sequence[Any]  # a label or a text for every test example
    scores: Array  # (N,): right or wrong, or ROUGE-L
    parameters: Mapping[str, int]
    timing: Mapping[str, float]
    memory: Mapping[str, Any]
    bundle_bytes: int
    latency: Mapping[str, float]
    forgetting: Mapping[str, float] | None
    best: Mapping[str, Any] | None  # of the evaluations on the way
    wall_seconds: float
    notes: Sequence[str]
    losses: Sequence[float] = ()  # of training, means over equal stretches
    guess: float | None = None  # mean score of outputs against the references of other texts
    warnings: Sequence[str] = ()  # of the training, a sentence each: why not to trust its version
    made: Mapping[str, Any] | None = None  # when, where and with what: date, device, threads, precision, versions

    @classmethod
    def of(cls, cell: Cell, said: Mapping[str, Any]) -> Result:
        return cls(
            spec=cell.candidate.spec,
            seed=cell.seed,
            fraction=cell.fraction,
            recipe=cell.recipe.to_toml(),
            kind=said["kind"],
            version=said["version"],
            digest=said.get("digest"),
            run=said.get("run"),
            base=said["base"],
            lr=said.get("lr"),
            metrics=said["metrics"],
            held=said.get("stored_metrics", {}),
            answers=said["answers"],
            scores=np.asarray(said["scores"], dtype=float),
            parameters=said["parameters"],
            timing=said.get("timing", {}),
            memory=said.get("memory", {}),
            bundle_bytes=said["bundle_bytes"],
            latency=said["latency"],
            forgetting=said["forgetting"],
            best=said.get("best"),
            wall_seconds=said["wall_seconds"],
            notes=said["notes"],
            losses=said.get("losses", ()),
            guess=said.get("guess"),
            made=said.get("made"),
            warnings=said.get("warnings", ()),
        )


def made_with(results: Iterable[Result]) -> dict[str, Any]:
    """When, where and with what the trainings were made: `from` and `to`, and a list of values where they differ."""
    told = [each.made for each in results if each.made]
    if not told:
        return {}
    days = sorted(str(each["date"]) for each in told)
    said: dict[str, Any] = {"from": days[0], "to": days[-1]}
    for key in told[0]:
        if key != "date":
            seen = {repr(each.get(key)): each.get(key) for each in told}
            said[key] = list(seen.values()) if len(seen) > 1 else told[0][key]
    return said
