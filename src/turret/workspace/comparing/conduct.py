"""Who conducts a comparison: one cell after another in a process of its own, what is there already left alone.

Loads no torch, so that it is small beside the trainings. Knows the design, the folder and the clock. Refuses to know
what a cell does inside, and what the results mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from turret.compare.candidates import Candidate, candidates
from turret.compare.comparison import Comparison, comparison
from turret.compare.design import Cell, design
from turret.compare.report import write_report
from turret.compare.results import Result
from turret.errors import RecipeError, StoreError, TrainingError
from turret.methods import Peft
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
    texts: bool = True  # whether the report shows examples
    confidence: float = 0.95


@dataclass
class Sitting:
    """One go at the cells that are missing."""

    store: Store
    folder: Path
    say: Say
    deadline: float | None = None
    results: dict[str, Result] = field(default_factory=dict)  # by the cell's key
    failures: dict[str, str] = field(default_factory=dict)  # spec -> one line
    missing: list[Cell] = field(default_factory=list)


def compare(store: Store, recipe: Recipe, wanted: Wanted, say: Say) -> Comparison:
    """Make what is missing, judge what is there, and write the report."""
    from turret.tasks import tables

    say(f"reading {recipe.data.source}")
    data = tables.read(recipe.data, recipe.task.kind, recipe.split_seed, multi_label=recipe.task.multi_label)
    if not data.test:
        raise RecipeError("a comparison is made on test examples, and there are none: give data.test")
    rows = candidates(wanted.methods, recipe, data.kind, wanted.lr)
    require_known(rows)
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
    sitting = Sitting(store, folder, say, deadline)
    with held(folder):
        run_cells(sitting, list(made.cells()))
        found = comparison(
            made, data, list(sitting.results.values()), failures=sitting.failures, missing=len(sitting.missing),
            confidence=wanted.confidence, budget=wanted.budget, folder=str(folder),
        )  # fmt: skip
        found = found if wanted.texts else found.without_texts()
        write_report(found, folder, state.write_text)
    return found


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, made where it is not there, for this process alone."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise StoreError(f"{folder} is being compared by another process: wait for it, or end it") from None
    except OSError as error:
        raise StoreError(f"the comparison cannot be kept in {folder}: {error.strerror or error}") from None


def require_known(rows: Sequence[Candidate]) -> None:
    """Ask PEFT, loaded for this alone, whether it knows its methods and their settings, before anything is trained."""
    for row in rows:
        method = row.recipe.method
        if isinstance(method, Peft):
            from turret.adapters.through_peft import config_of

            try:
                config_of(method)
            except RecipeError as error:
                raise RecipeError(f"{row.spec}: {error}") from None


def run_cells(sitting: Sitting, cells: Sequence[Cell]) -> None:
    """Carry out what is missing, in order, until the budget ends; raises TrainingError where nothing came of it."""
    took: dict[tuple[str, float], float] = {}
    for number, cell in enumerate(cells, 1):
        name, here = cell.candidate.spec, sitting.folder / "cells" / cell.key
        done = state.read(here / "result.json") or _same_base(sitting, cell, here)
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
            sitting.results[cell.key] = Result.of(cell, done)
        else:
            sitting.missing.append(cell)
    if not sitting.results:
        said_of = "; ".join(f"{name}: {why}" for name, why in sitting.failures.items())
        raise TrainingError(f"nothing could be compared: {said_of or 'the budget ended before the first run did'}")


def _same_base(sitting: Sitting, cell: Cell, here: Path) -> dict[str, Any] | None:
    """What the bare base wrote under an earlier seed: it draws nothing, so it would write that again."""
    if cell.candidate.kind != "base":
        return None
    for key in sitting.results:
        earlier = state.read(sitting.folder / "cells" / key / "result.json")
        if earlier and earlier["version"] is None and earlier["kind"] != "classify":
            state.write(here / "result.json", earlier)
            return earlier
    return None


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
