"""Comparisons without a training: results as a process writes them, with scores of known quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from turret.compare.comparison import Comparison, comparison
from turret.compare.design import Cell, Spread, candidates, design, power
from turret.compare.results import CellResult
from turret.data import Dataset, Labelled, Pair
from turret.recipe import Recipe

LABELS = ("bad", "good")
WEIGHTS = {"full": 22_700_000, "lora": 74_000, "prefix": 900_000, "head": 800, "linear": 800, "base": 0}


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


MADE = {
    "date": "2026-01-02T03:04:05Z", "device": "cpu, Some Processor (family 1, model 2)", "threads": 1,
    "precision": "float32", "versions": {"python": "3.12.0", "turret": "0.1.0", "torch": "2.9.0"}, "commit": "abc123",
}  # fmt: skip


def losses(accuracy: float, number: int, steps: int = 40, falling: bool = False) -> list[float]:
    """A loss that falls early, or to the last step, or not at all where nothing is learnt."""
    noise = 0.01 * np.random.default_rng([3, number]).standard_normal(steps)
    if accuracy <= 0.5:
        return (0.69 + noise).tolist()
    time = np.linspace(0, 1, steps)
    fallen = time if falling else 1 - np.exp(-8 * time)
    return (0.69 - 0.5 * fallen + noise).tolist()


def result(
    cell: Cell, data: Dataset, accuracy: float, number: int, falling: bool = False, steps: int = 40
) -> CellResult:
    kind = cell.candidate.kind
    rng = np.random.default_rng([7, number])
    hard = np.random.default_rng(1).random(len(data.test))
    own = np.where(rng.random(len(hard)) < 0.8, hard, rng.random(len(hard)))
    scores = (own < accuracy).astype(float)
    if data.kind == "classify" and accuracy <= 0.5:  # one answer to every text
        answers = [LABELS[0]] * len(scores)
        scores = np.array([float(e.label == LABELS[0]) for e in data.test])
    elif data.kind == "classify":
        answers = [e.label if s else LABELS[e.label == "bad"] for e, s in zip(data.test, scores, strict=True)]
    elif accuracy <= 0.5:
        scores, answers = np.full(len(scores), 0.05), ["nonsense"] * len(scores)
    else:
        answers = [e.target if s else "nonsense" for e, s in zip(data.test, scores, strict=True)]
    size = 4 * WEIGHTS[kind]
    parts = {"weights": 9e7, "trainable": size, "gradients": size, "optimiser": 2 * size, "activations": 5e7}
    trained = {
        "version": f"tiny@{number}", "digest": f"sha256:{number}", "run": f"run-{number}", "lr": 1e-3,
        "timing": {"train_seconds": 30.0 if kind == "full" else 20.0 + cell.seed % 3, "steps": steps},
        "memory": {
            "peak_bytes": 5e8 + 4 * size, "above_base_bytes": 5e7 + 4 * size, "predicted": parts, "measured": parts,
        },
        "best": {"merit": 0.9, "seconds": 12.0, "step": 5, "split": "test"},
        "losses": losses(accuracy, number, falling=falling), "made": MADE,
        "warnings": ["its loss is that of guessing"] if accuracy <= 0.5 else [],
    }  # fmt: skip
    said = {
        "kind": data.kind, "base": {"id": "small", "fingerprint": "sha256:base"}, "answers": answers,
        "metrics": {"accuracy": float(scores.mean()), "loss": 0.3}, "scores": scores.tolist(),
        "parameters": {"trainable": WEIGHTS[kind], "stored": WEIGHTS[kind], "total": 22_700_000},
        "bundle_bytes": size, "latency": {"median_seconds": 0.004, "slowest_seconds": 0.01, "answers": 20},
        "forgetting": None if data.kind == "classify" else {"loss": 3.2, "base_loss": 3.0},
        "wall_seconds": 40.0, "notes": [], "version": None,
        "guess": None if data.kind == "classify" else 0.05,
    }  # fmt: skip
    if kind == "linear":
        said |= {"timing": {"train_seconds": 1.0}, "said": "linear is a logistic regression", "seedless": True}
    return CellResult.of(cell, said | (trained if cell.candidate.trains else {}))


def made(
    methods: str = "base,linear,full,lora,prefix",
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
    collapsed: Mapping[str, Sequence[int]] | None = None,
    falling: Sequence[str] = (),
    steps: Mapping[str, int] | None = None,
    twins: Sequence[str] = (),
    by_spec: Mapping[str, float] | None = None,
    backwards: bool = False,
    **quality: float,
) -> Comparison:
    """quality: the accuracy of a method, by its kind; collapsed: seeds of a method that learnt nothing; falling: specs
    whose loss falls to the last step; steps, by_spec: the steps and the accuracy of a row; twins: rows of the baseline
    that are trained for other steps; backwards: the last cell ended first."""
    usual = {"base": 0.5, "head": 0.8, "linear": 0.9, "full": 0.95, "lora": 0.95, "prefix": 0.85} | quality
    recipe = Recipe(name="tiny", base="small", data="tiny.csv")
    data = dataset(count, kind, text)
    plan = design(
        recipe, candidates(methods, recipe, data.kind), seeds=seeds, fractions=fractions, against=against,
        margin=margin, train=len(data.train), twins=twins,
    )  # fmt: skip

    def accuracy(cell: Cell) -> float:
        lost = cell.seed in (collapsed or {}).get(cell.candidate.spec, ())
        good = (by_spec or {}).get(cell.candidate.spec, usual[cell.candidate.kind])
        return 0.5 if lost else good - 0.1 * (1 - cell.fraction)

    results = [
        result(
            cell,
            data,
            accuracy(cell),
            number,
            cell.candidate.spec in falling,
            (steps or {}).get(cell.candidate.spec, 40),
        )
        for number, cell in enumerate(plan.cells(), 1)
        if cell.candidate.spec not in without
    ]
    if backwards:
        results.reverse()
    return comparison(
        plan, data, results, failures=failures or {}, missing=missing, budget=None, folder="there",
        command="turret compare tiny.csv --base small", power=power(Spread.assumed(data.kind), seeds, count, margin),
    )  # fmt: skip
