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
from statistics import fmean
from typing import Any, Literal

from turret.compare.candidates import Candidate, candidates, is_floor
from turret.compare.comparison import Comparison, SeededResults, comparison, paired
from turret.compare.design import Cell, Design, PlannedDesign, design
from turret.compare.power import Power, Spread, power
from turret.compare.report import write_report
from turret.compare.report_text import seconds as span
from turret.compare.results import Result
from turret.errors import RecipeError, StoreError, TrainingError
from turret.methods.lookup import numbers_of
from turret.recipe import Recipe
from turret.store import Store
from turret.tasks import schemas, task_of
from turret.workspace.comparing import state
from turret.workspace.comparing.cell_process import carried_out
from turret.workspace.comparing.command import command

Say = Callable[[str], None]
# What will come again whatever the method is: no use in trying the next cell.
EVERYWHERE = ("BaseModelError", "UnknownFamily", "DataError", "StoreError", "Corrupt", "RecipeError")


@dataclass(frozen=True)
class ComparisonRequest:
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

    def command(self, recipe: Recipe) -> str:
        """The command line that asks for the same."""
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
    """One go at the cells that are missing."""

    store: Store
    folder: Path
    say: Say
    deadline: float | None = None
    results: dict[str, Result] = field(default_factory=dict)  # by the cell's key
    failures: dict[str, str] = field(default_factory=dict)  # spec -> one line
    missing: list[Cell] = field(default_factory=list)
    last: str = ""  # the score of the training before


@dataclass(frozen=True)
class Prepared:
    """Everything before the first training."""

    data: Any
    design: Design
    folder: Path
    planned: PlannedDesign


def compare(
    store: Store,
    recipe: Recipe,
    wanted: ComparisonRequest,
    say: Say,
    on_plan: Callable[[PlannedDesign], None] | None = None,
) -> Comparison:
    """Make what is missing, judge what is there, and write the report. on_plan: called before the first training."""
    ready = prepare(store, recipe, wanted, say)
    if on_plan is not None:
        on_plan(ready.planned)
    deadline = None if wanted.budget is None else time.monotonic() + wanted.budget
    sitting = Sitting(store, ready.folder, say, deadline)
    with held(ready.folder):
        run_cells(sitting, list(ready.design.cells()))
        found = comparison(
            ready.design, ready.data, list(sitting.results.values()), failures=sitting.failures,
            missing=len(sitting.missing), confidence=wanted.confidence, budget=wanted.budget,
            folder=str(ready.folder), command=wanted.command(recipe), power=ready.planned.power,
        )  # fmt: skip
        found = found if wanted.texts else found.without_texts()
        write_report(found, ready.folder, state.write_text)
    return found


def prepare(store: Store, recipe: Recipe, wanted: ComparisonRequest, say: Say) -> Prepared:
    """Read the data, make the design, and say what it can decide. Trains nothing and writes nothing."""
    from turret.data.dataset import read

    say(f"reading {recipe.data.source}")
    data = read(recipe.data, schemas(recipe.task), recipe.split_seed)
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
    cells = list(made.cells())
    there = [each for each in (_there(folder, cell) for cell in cells) if each is not None]
    planned = PlannedDesign(
        name=recipe.name,
        methods=tuple(row.label for row in rows),
        against=made.against,
        trainings=len(cells),
        missing=len(cells) - len(there),
        power=_power(made, data, there, wanted.confidence),
        folder=str(folder),
    )
    return Prepared(data, made, folder, planned)


def _there(folder: Path, cell: Cell) -> Result | None:
    """The result of a cell that an earlier sitting made."""
    said = state.read(folder / "cells" / cell.key / "result.json")
    return None if said is None else Result.of(cell, said)


def _power(made: Design, data: Any, there: Sequence[Result], confidence: float) -> Power:
    """What the design can decide, from the spread of what has run or from an assumed one."""
    whole = [each for each in there if each.fraction == made.fractions[0]]
    sides = {row.spec: SeededResults.of(row.spec, whole, data.test).trained for row in made.candidates}
    contenders = [row.spec for row in made.candidates if not is_floor(row.kind) and row.spec != made.against]
    pairs = [d for spec in contenders if (d := paired(sides[spec], sides[made.against])) is not None]
    spread = Spread.measured(pairs) or Spread.assumed(data.kind)
    return power(spread, len(made.seeds), len(data.test), made.margin, confidence=confidence)


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
        if row.recipe.method.open_settings:
            try:
                numbers_of(row.recipe.method).require_known()
            except RecipeError as error:
                raise RecipeError(f"{row.spec}: {error}") from None


def run_cells(sitting: Sitting, cells: Sequence[Cell]) -> None:
    """Carry out what is missing, in order, until the budget ends; raises TrainingError where nothing came of it."""
    for number, cell in enumerate(cells, 1):
        name, here = cell.candidate.spec, sitting.folder / "cells" / cell.key
        done = state.read(here / "result.json") or _same_base(sitting, cell, here)
        if done is None and name not in sitting.failures:
            left = None if sitting.deadline is None else sitting.deadline - time.monotonic()
            if left is not None and left <= (_usual(sitting, cell, own=True) or 0.0):
                sitting.missing.append(cell)
                continue
            done = _run(sitting, cell, here, left, _title(sitting, cells, number))
        if done is not None:
            sitting.results[cell.key] = Result.of(cell, done)
            sitting.last = f"{cell.candidate.label} {100 * float(sitting.results[cell.key].scores.mean()):.1f}"
        else:
            sitting.missing.append(cell)
    if not sitting.results:
        said_of = "; ".join(f"{name}: {why}" for name, why in sitting.failures.items())
        raise TrainingError(f"nothing could be compared: {said_of or 'the budget ended before the first run did'}")


def _title(sitting: Sitting, cells: Sequence[Cell], number: int) -> str:
    """`3 of 25  lora, seed 42; last full 95.2; about 12 min left`."""
    rest = [each for each in cells[number - 1 :] if not (sitting.folder / "cells" / each.key / "result.json").exists()]
    usual = [_usual(sitting, each) for each in rest if each.candidate.spec not in sitting.failures]
    known = [each for each in usual if each is not None]
    parts = [f"{number} of {len(cells)}  {cells[number - 1]}"]
    parts += [f"last {sitting.last}"] if sitting.last else []
    parts += [f"about {span(sum(known) * len(usual) / len(known))} left"] if known else []
    return "; ".join(parts)


def _usual(sitting: Sitting, cell: Cell, *, own: bool = False) -> float | None:
    """Seconds that a cell takes, told by those like it, or by all that were trained where none is and `own` is not."""
    trained = [each for each in sitting.results.values() if (each.version is None) == (cell.candidate.kind == "base")]
    alike = [each for each in trained if each.spec == cell.candidate.spec and each.fraction == cell.fraction]
    if alike or own:
        return fmean(each.wall_seconds for each in alike) if alike else None
    return fmean(each.wall_seconds * cell.fraction / each.fraction for each in trained) if trained else None


def _same_base(sitting: Sitting, cell: Cell, here: Path) -> dict[str, Any] | None:
    """What the bare base wrote under an earlier seed: it draws nothing, so it would write that again."""
    if cell.candidate.kind != "base":
        return None
    for key in sitting.results:
        earlier = state.read(sitting.folder / "cells" / key / "result.json")
        if earlier and earlier["version"] is None and task_of(earlier["kind"]).generates:
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
