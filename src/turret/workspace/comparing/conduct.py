"""Conduct a comparison: run each cell of the design in its own process; keep the results that are there already.

A cell is one training of one method with one seed. This process loads no torch, so that it takes little memory next to
the trainings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

from filelock import FileLock, Timeout

from turret.compare.candidates import Candidate, candidates, is_floor
from turret.compare.comparison import Comparison, SeededResults, comparison, paired
from turret.compare.design import Cell, Design, PlannedDesign
from turret.compare.design import design as make_design
from turret.compare.power import Power, Spread, power
from turret.compare.report import write_report
from turret.compare.report_text import seconds as span
from turret.compare.results import Result
from turret.data import Dataset
from turret.data.dataset import read
from turret.errors import RecipeError, StoreError, TrainingError
from turret.json_types import JsonObject
from turret.methods.lookup import numbers_of
from turret.recipe import Recipe
from turret.store import Store
from turret.tasks import schemas, task_of
from turret.workspace.comparing import state
from turret.workspace.comparing.cell_process import run_cell
from turret.workspace.comparing.command import command
from turret.workspace.progress import Say

# Errors that every cell would meet, so the next one is not tried.
EVERYWHERE = ("BaseModelError", "UnknownFamily", "DataError", "StoreError", "Corrupt", "RecipeError")


@dataclass(frozen=True)
class ComparisonRequest:
    """The options of a comparison."""

    methods: str | None = None  # None: those of base, head, full, lora, prefix that suit the task
    seeds: int = 5
    budget: float | None = None  # seconds; None: until all cells have run
    fractions: tuple[float, ...] = (1.0,)  # of the training examples
    margin: float = 1.0  # points
    against: str = "full"
    lr: float | Literal["auto"] | None = None  # for every method; None: each method's own
    texts: bool = True  # whether the report shows examples
    confidence: float = 0.95

    def command(self, recipe: Recipe) -> str:
        """The command line with the same options."""
        fractions = None if self.fractions == (1.0,) else ",".join(f"{each:g}" for each in self.fractions)
        return command(
            "compare", recipe,
            {
                "methods": self.methods, "seeds": self.seeds, "fractions": fractions, "margin": f"{self.margin:g}",
                "against": self.against, "lr": self.lr, "no-texts": not self.texts,
            },
        )  # fmt: skip


@dataclass
class Sitting:
    """One call that runs the missing cells."""

    store: Store
    folder: Path
    say: Say
    deadline: float | None = None
    results: dict[str, Result] = field(default_factory=dict)  # by the cell's key
    failures: dict[str, str] = field(default_factory=dict)  # spec -> one line
    missing: list[Cell] = field(default_factory=list)
    last: str = ""  # method and score of the previous cell


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
) -> Comparison:
    """Run the missing cells, judge all results, and write the report.

    Args:
        on_plan: called before the first training.
    """
    ready = prepare(store, recipe, request, say)
    if on_plan is not None:
        on_plan(ready.planned)
    deadline = None if request.budget is None else time.monotonic() + request.budget
    sitting = Sitting(store, ready.folder, say, deadline)
    with locked(ready.folder):
        run_cells(sitting, list(ready.design.cells()))
        result = comparison(
            ready.design, ready.data, list(sitting.results.values()), failures=sitting.failures,
            missing=len(sitting.missing), confidence=request.confidence, budget=request.budget,
            folder=str(ready.folder), command=request.command(recipe), power=ready.planned.power,
        )  # fmt: skip
        result = result if request.texts else result.without_texts()
        write_report(result, ready.folder, state.write_text)
    return result


def prepare(store: Store, recipe: Recipe, request: ComparisonRequest, say: Say) -> Prepared:
    """Read the data, make the design, and compute its power. Trains and writes nothing."""
    say(f"reading {recipe.data.source}")
    data = read(recipe.data, schemas(recipe.task), recipe.split_seed)
    if not data.test:
        raise RecipeError("a comparison needs test examples, and the data has none: give data.test")
    rows = candidates(request.methods, recipe, data.kind, request.lr)
    require_known(rows)
    design = make_design(
        recipe,
        rows,
        seeds=request.seeds,
        fractions=request.fractions,
        against=request.against,
        margin=request.margin,
        train=len(data.train),
    )
    folder = state.folder_of(store.root, recipe, data.digest)
    cells = list(design.cells())
    results = [each for each in (_stored_result(folder, cell) for cell in cells) if each is not None]
    planned = PlannedDesign(
        name=recipe.name,
        methods=tuple(row.label for row in rows),
        against=design.against,
        trainings=len(cells),
        missing=len(cells) - len(results),
        power=_power(design, data, results, request.confidence),
        folder=str(folder),
    )
    return Prepared(data, design, folder, planned)


def _stored_result(folder: Path, cell: Cell) -> Result | None:
    """The result of a cell that an earlier call ran."""
    stored = state.read(folder / "cells" / cell.key / "result.json")
    return None if stored is None else Result.of(cell, stored)


def _power(design: Design, data: Dataset, results: Sequence[Result], confidence: float) -> Power:
    """What the design can detect, from the spread of the results so far, or from an assumed spread."""
    whole = [each for each in results if each.fraction == design.fractions[0]]
    sides = {row.spec: SeededResults.of(row.spec, whole, data.test).trained for row in design.candidates}
    contenders = [row.spec for row in design.candidates if not is_floor(row.kind) and row.spec != design.against]
    pairs = [d for spec in contenders if (d := paired(sides[spec], sides[design.against])) is not None]
    spread = Spread.measured(pairs) or Spread.assumed(data.kind)
    return power(spread, len(design.seeds), len(data.test), design.margin, confidence=confidence)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if it is missing, and lock it for this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise StoreError(f"another process runs the comparison in {folder}: wait for it, or end it") from None
    except OSError as error:
        raise StoreError(f"the comparison cannot be written to {folder}: {error.strerror or error}") from None


def require_known(rows: Sequence[Candidate]) -> None:
    """Check methods of PEFT and their settings before anything is trained; only this check loads PEFT."""
    for row in rows:
        if row.recipe.method.open_settings:
            try:
                numbers_of(row.recipe.method).require_known()
            except RecipeError as error:
                raise RecipeError(f"{row.spec}: {error}") from None


def run_cells(sitting: Sitting, cells: Sequence[Cell]) -> None:
    """Run the missing cells in order until the budget ends. Raises TrainingError if there is no result at all."""
    for number, cell in enumerate(cells, 1):
        name, here = cell.candidate.spec, sitting.folder / "cells" / cell.key
        result = state.read(here / "result.json") or _same_base(sitting, cell, here)
        if result is None and name not in sitting.failures:
            left = None if sitting.deadline is None else sitting.deadline - time.monotonic()
            if left is not None and left <= (_expected_seconds(sitting, cell, own=True) or 0.0):
                sitting.missing.append(cell)
                continue
            result = _run(sitting, cell, here, left, _title(sitting, cells, number))
        if result is not None:
            sitting.results[cell.key] = Result.of(cell, result)
            sitting.last = f"{cell.candidate.label} {100 * float(sitting.results[cell.key].scores.mean()):.1f}"
        else:
            sitting.missing.append(cell)
    if not sitting.results:
        failures = "; ".join(f"{name}: {why}" for name, why in sitting.failures.items())
        raise TrainingError(f"nothing could be compared: {failures or 'the budget ended before the first run did'}")


def _title(sitting: Sitting, cells: Sequence[Cell], number: int) -> str:
    """`3 of 25  lora, seed 42; last full 95.2; about 12 min left`."""
    rest = [each for each in cells[number - 1 :] if not (sitting.folder / "cells" / each.key / "result.json").exists()]
    expected = [_expected_seconds(sitting, each) for each in rest if each.candidate.spec not in sitting.failures]
    known = [each for each in expected if each is not None]
    parts = [f"{number} of {len(cells)}  {cells[number - 1]}"]
    parts += [f"last {sitting.last}"] if sitting.last else []
    parts += [f"about {span(sum(known) * len(expected) / len(known))} left"] if known else []
    return "; ".join(parts)


def _expected_seconds(sitting: Sitting, cell: Cell, *, own: bool = False) -> float | None:
    """The mean time of cells with the same method and fraction; if there are none, of all trainings, unless `own`."""
    trained = [each for each in sitting.results.values() if (each.version is None) == (cell.candidate.kind == "base")]
    alike = [each for each in trained if each.spec == cell.candidate.spec and each.fraction == cell.fraction]
    if alike or own:
        return fmean(each.wall_seconds for each in alike) if alike else None
    return fmean(each.wall_seconds * cell.fraction / each.fraction for each in trained) if trained else None


def _same_base(sitting: Sitting, cell: Cell, here: Path) -> JsonObject | None:
    """The bare base's result under an earlier seed. Generation draws no random number."""
    if cell.candidate.kind != "base":
        return None
    for key in sitting.results:
        earlier = state.read(sitting.folder / "cells" / key / "result.json")
        if earlier and earlier["version"] is None and task_of(earlier["kind"]).generates:
            state.write(here / "result.json", earlier)
            return earlier
    return None


def _run(sitting: Sitting, cell: Cell, here: Path, left: float | None, title: str) -> JsonObject | None:
    """Run a cell in a fresh process. None: it failed, or the budget ended first."""
    request = {
        "kind": cell.candidate.kind,
        "recipe": cell.recipe.to_toml(),
        "store": str(sitting.store.root.absolute()),
    }
    state.write(here / "request.json", request)
    sitting.say(title)
    problem = run_cell(here, left, lambda line: sitting.say(f"{title}: {line}"))
    result = state.read(here / "result.json")
    if result is not None or problem is None:
        return result
    failed = state.read(here / "failed.json") or {"error": problem, "kind": ""}
    if failed["kind"] in EVERYWHERE:
        raise TrainingError(f"{cell}: {failed['error']}")
    sitting.failures[cell.candidate.spec] = f"seed {cell.seed}: {failed['error']}"
    return None
