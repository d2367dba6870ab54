"""Who conducts a comparison: one cell after another in a process of its own, what is there already left alone.

Loads no torch, so that it is small beside the trainings. Knows the design, the folder and the clock. Refuses to know
what a cell does inside, and what the results mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from turret.compare.candidates import candidates
from turret.compare.comparison import Comparison, comparison
from turret.compare.design import Cell, Design, design
from turret.compare.report import write_report
from turret.compare.results import Result
from turret.errors import RecipeError, StoreError, TrainingError
from turret.recipe import Recipe
from turret.store import Store
from turret.workspace.comparing import state
from turret.workspace.comparing.child import carried_out

Say = Callable[[str], None]
# What will come again whatever the method is: no use in trying the next cell.
EVERYWHERE = ("BaseModelError", "UnknownFamily", "DataError", "StoreError", "Corrupt", "RecipeError")


@dataclass(frozen=True)
class Wanted:
    """What the user asks of a comparison."""

    methods: str | None = None  # None: base, head, full, lora, prefix as the task allows
    seeds: int = 5
    budget: float | None = None  # seconds of this sitting; None: until all is done
    fractions: tuple[float, ...] = (1.0,)  # of the training examples
    margin: float = 1.0  # points
    against: str = "full"
    lr: float | Literal["auto"] | None = None  # for every method; None: each its own
    confidence: float = 0.95


@dataclass
class Sitting:
    """One go at the cells that are missing."""

    store: Store
    folder: Path
    design: Design
    say: Say
    deadline: float | None
    results: list[Result] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # spec -> one line
    missing: list[Cell] = field(default_factory=list)


def compare(store: Store, recipe: Recipe, wanted: Wanted, say: Say) -> Comparison:
    """Make what is missing, judge what is there, and write the report."""
    from filelock import FileLock, Timeout

    from turret.tasks import tables

    say(f"reading {recipe.data.source}")
    data = tables.read(recipe.data, recipe.task.kind, recipe.split_seed, multi_label=recipe.task.multi_label)
    if not data.test:
        raise RecipeError("a comparison is made on test examples, and there are none: give data.test")
    rows = candidates(wanted.methods, recipe, data.kind, wanted.lr)
    made = design(
        recipe,
        rows,
        seeds=wanted.seeds,
        fractions=wanted.fractions,
        against=wanted.against,
        margin=wanted.margin,
        train=len(data.train),
    )
    folder = state.folder_of(store.root, recipe, data.digest)
    deadline = None if wanted.budget is None else time.monotonic() + wanted.budget
    sitting = Sitting(store, folder, made, say, deadline)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", timeout=0)
        with lock:
            _run_all(sitting)
            found = comparison(
                made, data, sitting.results, failures=sitting.failures, missing=len(sitting.missing),
                confidence=wanted.confidence, budget=wanted.budget, folder=str(folder),
            )  # fmt: skip
            write_report(found, folder, state.write_text)
    except Timeout:
        raise StoreError(f"{folder} is being compared by another process: wait for it, or end it") from None
    except OSError as error:
        raise StoreError(f"the comparison cannot be kept in {folder}: {error.strerror or error}") from None
    return found


def _run_all(sitting: Sitting) -> None:
    cells = list(sitting.design.cells())
    took: dict[tuple[str, float], float] = {}
    for number, cell in enumerate(cells, 1):
        name, here = cell.candidate.spec, sitting.folder / "cells" / cell.key
        done = state.read(here / "result.json")
        if done is None and name not in sitting.failures:
            left = None if sitting.deadline is None else sitting.deadline - time.monotonic()
            usual = took.get((name, cell.fraction), 0.0)
            if left is not None and left <= usual:
                sitting.missing.append(cell)
                continue
            began = time.monotonic()
            done = _run(sitting, cell, here, left, f"{number} of {len(cells)}  {cell}")
            took[name, cell.fraction] = time.monotonic() - began
        if done is not None:
            sitting.results.append(Result.of(cell, done))
        else:
            sitting.missing.append(cell)
    if not sitting.results:
        said_of = "; ".join(f"{name}: {why}" for name, why in sitting.failures.items())
        raise TrainingError(f"nothing could be compared: {said_of or 'the budget ended before the first run did'}")


def _run(sitting: Sitting, cell: Cell, here: Path, left: float | None, title: str) -> dict[str, Any] | None:
    """Have a fresh process carry the cell out; None where it failed or the budget ended first."""
    request = {
        "kind": cell.candidate.kind,
        "recipe": cell.recipe.to_toml(),
        "store": str(sitting.store.root.absolute()),
    }
    state.write(here / "request.json", request)
    sitting.say(title)
    problem = carried_out(here, left, lambda words: sitting.say(f"{title}: {words}"))
    done = state.read(here / "result.json")
    if done is not None or problem is None:
        return done
    failed = state.read(here / "failed.json") or {"error": problem, "kind": ""}
    if failed["kind"] in EVERYWHERE:
        raise TrainingError(f"{cell}: {failed['error']}")
    sitting.failures[cell.candidate.spec] = f"seed {cell.seed}: {failed['error']}"
    return None
