"""Comparisons without a training: results as a process writes them, with scores of known quality."""

from __future__ import annotations

from typing import Any

import numpy as np

from turret.compare.candidates import candidates
from turret.compare.comparison import Comparison, comparison
from turret.compare.design import Cell, design
from turret.compare.results import Result
from turret.recipe import Recipe
from turret.tasks.tables import Dataset
from turret.tasks.task import Labelled, Pair

LABELS = ("bad", "good")
WEIGHTS = {"full": 22_700_000, "lora": 74_000, "prefix": 900_000, "head": 800, "base": 0}


def dataset(count: int, kind: Any = "classify", text: str = "number {}") -> Dataset:
    def make(start: int, some: int) -> list[Any]:
        numbers = range(start, start + some)
        if kind == "classify":
            return [Labelled(text.format(number), LABELS[number % 2]) for number in numbers]
        return [Pair(text.format(number), f"answer {number}") for number in numbers]

    return Dataset(
        train=make(0, 40), validation=[], test=make(40, count), kind=kind, labels=LABELS if kind == "classify" else (),
        columns={}, notes=("a note",), duplicates=0, digest="sha256:tiny",
    )  # fmt: skip


def result(cell: Cell, data: Dataset, accuracy: float, number: int) -> Result:
    kind = cell.candidate.kind
    rng = np.random.default_rng([7, number])
    hard = np.random.default_rng(1).random(len(data.test))
    own = np.where(rng.random(len(hard)) < 0.8, hard, rng.random(len(hard)))
    scores = (own < accuracy).astype(float)
    if data.kind == "classify":
        answers = [e.label if s else LABELS[e.label == "bad"] for e, s in zip(data.test, scores, strict=True)]
    else:
        answers = [e.target if s else "nonsense" for e, s in zip(data.test, scores, strict=True)]
    size = 4 * WEIGHTS[kind]
    parts = {"weights": 9e7, "trainable": size, "gradients": size, "optimiser": 2 * size, "activations": 5e7}
    trained = {
        "version": f"tiny@{number}", "digest": f"sha256:{number}", "run": f"run-{number}", "lr": 1e-3,
        "timing": {"train_seconds": 30.0 if kind == "full" else 20.0 + cell.seed % 3},
        "memory": {
            "peak_bytes": 5e8 + 4 * size, "above_base_bytes": 5e7 + 4 * size, "predicted": parts, "measured": parts,
        },
        "best": {"merit": 0.9, "seconds": 12.0, "step": 5, "split": "test"},
    }  # fmt: skip
    said = {
        "kind": data.kind, "base": {"id": "small", "fingerprint": "sha256:base"}, "answers": answers,
        "metrics": {"accuracy": float(scores.mean()), "loss": 0.3}, "scores": scores.tolist(),
        "parameters": {"trainable": WEIGHTS[kind], "stored": WEIGHTS[kind], "total": 22_700_000},
        "bundle_bytes": size, "latency": {"median_seconds": 0.004, "slowest_seconds": 0.01, "answers": 20},
        "forgetting": None if data.kind == "classify" else {"loss": 3.2, "base_loss": 3.0},
        "wall_seconds": 40.0, "notes": [], "version": None,
    }  # fmt: skip
    return Result.of(cell, said | ({} if kind == "base" else trained))


def made(
    methods: str = "base,head,full,lora,prefix",
    *,
    seeds: int = 4,
    count: int = 1500,
    fractions: tuple[float, ...] = (1.0,),
    kind: Any = "classify",
    against: str = "full",
    margin: float = 1.0,
    text: str = "number {}",
    failures: dict[str, str] | None = None,
    without: tuple[str, ...] = (),
    missing: int = 0,
    **quality: float,
) -> Comparison:
    """quality: the accuracy of a method, by its kind."""
    usual = {"base": 0.5, "head": 0.8, "full": 0.95, "lora": 0.95, "prefix": 0.85} | quality
    recipe = Recipe(name="tiny", base="small", data="tiny.csv")
    data = dataset(count, kind, text)
    plan = design(
        recipe, candidates(methods, recipe, data.kind), seeds=seeds, fractions=fractions, against=against,
        margin=margin, train=len(data.train),
    )  # fmt: skip
    results = [
        result(cell, data, usual[cell.candidate.kind] - 0.1 * (1 - cell.fraction), number)
        for number, cell in enumerate(plan.cells(), 1)
        if cell.candidate.spec not in without
    ]
    return comparison(
        plan, data, results, failures=failures or {}, missing=missing, confidence=0.95, budget=None, folder="there",
    )  # fmt: skip
