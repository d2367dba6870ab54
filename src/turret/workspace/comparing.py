"""Compare methods: make the design, run its cells, judge the results, and write the report.

Loads no torch, so that this process takes little memory next to the trainings. `cells` runs the trainings and
measurements, as jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turret.compare.comparison import Comparison, SeededResults, comparison, paired_differences
from turret.compare.design import (
    Candidate,
    Cell,
    Design,
    PlannedDesign,
    Power,
    Spread,
    candidates,
    is_floor,
    power,
    with_equal_epochs,
)
from turret.compare.design import design as make_design
from turret.compare.report import write_report
from turret.compare.results import CellResult
from turret.data import Dataset
from turret.errors import RecipeError
from turret.methods.method import usual_epochs
from turret.recipe import Recipe
from turret.store import Store
from turret.tasks import task_of
from turret.workspace.cells import (
    CellRunner,
    Workers,
    command,
    executor,
    folder_of,
    hold_comparison,
    read_json,
    require_executor,
    require_known,
)
from turret.workspace.progress import Say
from turret.workspace.queueing import MOST_CELLS, ComparisonRequest, with_absolute_base
from turret.workspace.reading import read_dataset, with_base


@dataclass(frozen=True)
class Prepared:
    """What a comparison knows before the first training."""

    data: Dataset
    design: Design
    folder: Path
    planned: PlannedDesign


def compare(
    store: Store,
    recipe: Recipe,
    request: ComparisonRequest,
    say: Say,
    on_plan: Callable[[PlannedDesign], None] | None = None,
    on: str | Workers | None = None,
) -> Comparison:
    """Run the missing cells, judge all results, and write the report.

    Args:
        on_plan: called before the first training.
        on: who runs the cells; see `executor`.
    """
    require_executor(on)
    if on is not None:
        recipe = with_absolute_base(recipe)
    ready = prepare(store, recipe, request, say)
    if on_plan is not None:
        on_plan(ready.planned)
    store.keep_rows(recipe.data.source)
    deadline = None if request.budget is None else time.monotonic() + request.budget
    with hold_comparison(store, ready.folder, say) as files, executor(on, store, ready.data) as tasks:
        timed, metric = ready.design.seeds[0], task_of(ready.data.kind).metric
        runner = CellRunner(store, ready.folder, say, deadline, files, timed=timed, tasks=tasks, metric=metric)
        runner.run(list(ready.design.cells()))
        results = list(runner.results.values())
        result = comparison(
            ready.design,
            ready.data,
            results,
            failures=runner.failures,
            missing=len(runner.missing),
            budget=request.budget,
            folder=str(ready.folder),
            command=command("compare", ready.design.recipe, request),
            power=_power(ready.design, ready.data, results),  # of the spread that was seen
        )
        result = result if request.texts else result.without_texts()
        write_report(result, ready.folder, files.write_text)
    return result


def prepare(
    store: Store, recipe: Recipe, request: ComparisonRequest, say: Say, data: Dataset | None = None
) -> Prepared:
    """Read the data, make the design, and compute its power. Trains nothing, and changes nothing in the store.

    Args:
        data: that of the recipe, if it is read already.
    """
    data = data or read_dataset(store, recipe, say)
    recipe, _ = with_base(recipe, data.kind)
    if not data.test:
        raise RecipeError("a comparison needs test examples, and the data has none: give data.test")
    named = candidates(request.methods, recipe, data.kind, request.lr)
    require_known(named)
    rows = with_equal_epochs(named, request.against, lambda row: _epochs(row, data))
    design = make_design(
        recipe,
        rows,
        seeds=request.seeds,
        fractions=request.fractions,
        against=request.against,
        margin=request.margin,
        train=len(data.train),
        twins=[row.spec for row in rows[len(named) :]],
    )
    folder = folder_of(store.home, recipe, data.digest)
    cells = list(design.cells())
    if store.exists():
        store.artifacts.bring(f"{folder.relative_to(store.root).as_posix()}/")
    results = [each for each in (_stored_result(folder, cell) for cell in cells) if each is not None]
    planned = PlannedDesign(
        name=recipe.name,
        methods=tuple(row.label for row in rows),
        against=design.against,
        trainings=len(cells),
        missing=len(cells) - len(results),
        power=_power(design, data, results),
        folder=str(folder),
    )
    return Prepared(data, design, folder, planned)


def require_few(planned: PlannedDesign) -> None:
    """Raise RecipeError if a comparison has too many cells for a row of the queue."""
    if planned.trainings > MOST_CELLS:
        raise RecipeError(
            f"{planned.trainings} cells: expected at most {MOST_CELLS}: give fewer methods, seeds or sizes"
        )


def _epochs(row: Candidate, data: Dataset) -> int:
    """The epochs of a row's trainings on all training examples: the recipe's, or the method's own."""
    train, task = row.recipe.train, task_of(data.kind)
    steps = row.recipe.method.steps(task.request, task.num_labels(data.labels) or 1)
    return train.epochs or usual_epochs(steps, len(data.train), train.batch_size)


def _stored_result(folder: Path, cell: Cell) -> CellResult | None:
    """The result of a cell that an earlier call ran."""
    stored = read_json(folder / "cells" / cell.key / "result.json")
    return None if stored is None else CellResult.of(cell, stored)


def _power(design: Design, data: Dataset, results: Sequence[CellResult]) -> Power:
    """What the design can detect, from the spread of the results so far, or from an assumed spread."""
    whole = [each for each in results if each.fraction == design.fractions[0]]
    sides = {row.spec: SeededResults.of(row.spec, whole, data.test).trained for row in design.candidates}
    contenders = [
        row.spec
        for row in design.candidates
        if row.trains and not is_floor(row.kind) and row.spec not in (design.against, *design.twins)
    ]
    pairs = [d for spec in contenders if (d := paired_differences(sides[spec], sides[design.against])) is not None]
    spread = Spread.measured(pairs) or Spread.assumed(data.kind)
    return power(spread, len(design.seeds), len(data.test), design.margin)
