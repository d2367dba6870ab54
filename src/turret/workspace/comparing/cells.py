"""Run cells. A cell is one training of one method with one seed, or one look at the base.

A cell whose time and memory are reported has a process of its own, and so has one that cannot share its base. All other
cells run one after another in one process, which loads their base once. Results of earlier calls are kept in the
comparison's folder and used again. Loads no torch.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from turret import process
from turret.compare.candidates import Candidate
from turret.compare.design import Cell
from turret.compare.report_text import seconds as span
from turret.compare.results import CellResult
from turret.errors import RecipeError, TrainingError
from turret.json_types import JsonObject, JsonValue
from turret.recipe import Data, Recipe
from turret.store import Store
from turret.workspace.child_process import KeptChild, run_child, why_alone
from turret.workspace.comparing import kept_files
from turret.workspace.comparing.kept_files import KeptFiles
from turret.workspace.progress import Say

# --- command ----------------------------------------------------------------------------------------------------------
# The command line that makes a report again: every setting of the recipe and of the request that is not a default.


def command(verb: str, recipe: Recipe, options: Mapping[str, str | int | float | None]) -> str:
    """`turret compare DATA --base B --name N --set train.epochs=1 --seeds 5`.

    Args:
        options: name -> value; True is written as a flag, None and False are left out.
    """
    words = ["turret", verb, recipe.data.source, "--base", recipe.base, "--name", recipe.name]
    words += ["--seed", str(recipe.seed)]
    for key, value in _changes(recipe):
        words += ["--set", f"{key}={value}"]
    for name, option in options.items():
        if option is not None and option is not False:
            words += [f"--{name}"] if option is True else [f"--{name}", str(option)]
    return shlex.join(words)


def _changes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, value) of every setting that is not the default, as `--set` reads them."""
    defaults = Recipe(name=recipe.name, base=recipe.base, data=Data(source=recipe.data.source))
    if recipe.method.kind != defaults.method.kind:
        yield "method", recipe.method.kind
    for table in ("data", "task", "method", "train"):
        settings = getattr(recipe, table)
        default = type(settings).model_construct() if table == "method" else getattr(defaults, table)
        for key, value in settings.model_dump(mode="json").items():
            if key != "kind" and value != _as_json(getattr(default, key, None)):
                yield from _texts(f"{table}.{key}", value)
        if table == "task" and settings.kind is not None:
            yield "task.kind", settings.kind


def _as_json(value: JsonValue) -> JsonValue:
    return list(value) if isinstance(value, tuple) else value


def _texts(key: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, number in value.items():
            yield f"{key}.{name}", f"{number:g}"
    elif value is None:
        yield key, "none"
    elif isinstance(value, (bool, Sequence)) and not isinstance(value, str):
        yield key, json.dumps(value)
    else:
        yield key, str(value)


# --- cells ------------------------------------------------------------------------------------------------------------


WORKER = "turret.workspace.comparing.cell_worker"
# A cell that failed so in the shared process is tried in one of its own.
SHORT_OF_MEMORY = ("PreflightRefused", "OutOfMemory")
# Errors that every cell would meet, so the next one is not tried.
EVERYWHERE = ("BaseModelError", "UnknownFamily", "DataError", "StoreError", "LeaseLost", "Corrupt", "RecipeError")


class CellRunner:
    """Runs the missing cells of a comparison, and collects the results of all its cells.

    Args:
        store: gets every trained version.
        folder: of the comparison.
        say: called with a line of progress.
        deadline: a value of `time.monotonic` at which the budget ends; None: no budget.
        files: writes the comparison's files; None: those of a folder store.
        timed: the seed whose cells have processes of their own, because their time and memory are reported.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        say: Say,
        deadline: float | None = None,
        files: KeptFiles | None = None,
        timed: int | None = None,
    ) -> None:
        self.store, self.folder, self.say, self.deadline = store, folder, say, deadline
        self.files, self.timed = files or KeptFiles(store), timed
        self._kept: KeptChild | None = None  # the process that cells share
        self.results: dict[str, CellResult] = {}  # by the cell's key
        self.failures: dict[str, str] = {}  # the candidate's spec -> one line
        self.missing: list[Cell] = []
        self.last = ""  # method and score of the previous cell

    def run(self, cells: Sequence[Cell]) -> None:
        """Run the missing cells in order until the budget ends. Raises TrainingError if there is no result at all."""
        try:
            self._run_missing(cells)
        finally:
            self._end_kept()
        kept = [self.folder / "cells" / key / "result.json" for key in self.results]
        self.store.artifacts.keep(kept, self.files.lease)  # a process of a cell may have lost the store at its end
        if not self.results:
            failures = "; ".join(f"{name}: {why}" for name, why in self.failures.items())
            raise TrainingError(f"nothing could be compared: {failures or 'the budget ended before the first run did'}")

    def _run_missing(self, cells: Sequence[Cell]) -> None:
        for number, cell in enumerate(cells, 1):
            name, here = cell.candidate.spec, self.folder / "cells" / cell.key
            result = kept_files.read(here / "result.json") or self._of_another_seed(cell, here)
            if result is None and name not in self.failures:
                if self._late(self._expected_seconds(cell, own=True) or 0.0):
                    self.missing.append(cell)
                    continue
                result = self._run(cell, here, self.title(cells, number))
            if result is not None:
                self.results[cell.key] = CellResult.of(cell, result)
                self.last = f"{cell.candidate.label} {100 * float(self.results[cell.key].scores.mean()):.1f}"
            else:
                self.missing.append(cell)

    def title(self, cells: Sequence[Cell], number: int) -> str:
        """`3 of 25  lora, seed 42; last full 95.2; about 12 min left`."""
        rest = [each for each in cells[number - 1 :] if not (self.folder / "cells" / each.key / "result.json").exists()]
        expected = [self._expected_seconds(each) for each in rest if each.candidate.spec not in self.failures]
        known = [each for each in expected if each is not None]
        parts = [f"{number} of {len(cells)}  {cells[number - 1]}"]
        parts += [f"last {self.last}"] if self.last else []
        parts += [f"about {span(sum(known) * len(expected) / len(known))} left"] if known else []
        return "; ".join(parts)

    def _expected_seconds(self, cell: Cell, *, own: bool = False) -> float | None:
        """The mean time of cells of the same method and fraction; if there are none, of all cells, unless `own`."""
        trained = [each for each in self.results.values() if (each.version is None) != cell.candidate.trains]
        alike = [each for each in trained if each.spec == cell.candidate.spec and each.fraction == cell.fraction]
        alike = [each for each in alike if each.resident == self._shares(cell)] or alike
        if alike or own:
            return fmean(each.wall_seconds for each in alike) if alike else None
        return fmean(each.wall_seconds * cell.fraction / each.fraction for each in trained) if trained else None

    def _of_another_seed(self, cell: Cell, here: Path) -> JsonObject | None:
        """The result of the same row under an earlier seed, if no seed changes it."""
        if cell.candidate.trains:
            return None
        for key, result in self.results.items():
            if (result.spec, result.fraction) == (cell.candidate.spec, cell.fraction):
                earlier = kept_files.read(self.folder / "cells" / key / "result.json")
                if earlier and earlier.get("seedless"):
                    self.files.write(here / "result.json", earlier)
                    return earlier
        return None

    def _late(self, seconds: float = 0.0) -> bool:
        """Whether the budget ends within so many seconds."""
        return self.deadline is not None and time.monotonic() + seconds >= self.deadline

    def _run(self, cell: Cell, here: Path, title: str) -> JsonObject | None:
        """Run a cell in a process. None: it failed, or the budget ended first."""
        self.files.require()
        lease = self.files.lease
        request = {
            "kind": cell.candidate.kind,
            "recipe": cell.recipe.to_toml(),
            "local": str(self.store.root.absolute()),
            "tenant": self.store.access.tenant,
            "comparison": f"{self.folder.parent.name}/{self.folder.name}",
            "lease": None if lease is None else lease.as_json(),
        }
        kept_files.write(here / "request.json", request)
        self.say(title)
        argument, errors = str(here.absolute()), here / "stderr.txt"
        tell = lambda line: self.say(f"{title}: {line}")
        failed: JsonObject = {}
        for shared in (True, False) if self._shares(cell) else (False,):
            (here / "failed.json").unlink(missing_ok=True)
            if shared:
                problem = self._shared_process().run(argument, tell, self._late)
            else:
                self._make_room(cell, again=bool(failed))
                problem = run_child(WORKER, argument, errors, tell, self.store.location, self._late)
            result = kept_files.read(here / "result.json")
            if result is not None or problem is None:
                return result
            failed = kept_files.read(here / "failed.json") or {"error": problem.text, "kind": ""}
            if failed["kind"] and failed["kind"] not in SHORT_OF_MEMORY:  # otherwise the process has died
                break
        if failed["kind"] in EVERYWHERE:
            raise TrainingError(f"{cell}: {failed['error']}")
        self.failures[cell.candidate.spec] = f"seed {cell.seed}: {failed['error']}"
        return None

    def _shares(self, cell: Cell) -> bool:
        """Whether a cell runs in the process that loads its base once for all such cells."""
        return cell.seed != self.timed and why_alone(cell.recipe) is None

    def _shared_process(self) -> KeptChild:
        if self._kept is not None and not self._kept.lives:
            self._end_kept()
        if self._kept is None:
            self._kept = KeptChild(WORKER, self.folder / "stderr.txt", self.store.location)
        return self._kept

    def _make_room(self, cell: Cell, *, again: bool) -> None:
        """End the shared process before a process of one cell, unless there is memory for both.

        Args:
            again: the cell failed in the shared process.
        """
        if self._kept is None:
            return
        done = self.results.values()
        alike = [each.memory for each in done if each.spec == cell.candidate.spec and each.memory and not each.resident]
        needed = max((each["peak_bytes"] + each["measured"]["weights"] for each in alike), default=None)
        elsewhere = any(each.made and not str(each.made["device"]).startswith("cpu,") for each in done)
        if again or needed is None or needed > process.free_memory() or elsewhere:
            self._end_kept()

    def _end_kept(self) -> None:
        if self._kept is not None:
            self._kept.close()
        self._kept = None


def require_known(rows: Sequence[Candidate]) -> None:
    """Check methods of PEFT and their settings before anything is trained; only this check loads torch and PEFT."""
    for row in rows:
        if row.recipe.method.open_settings:
            from turret.adapters.tuners.tuner import tuner_of

            try:
                tuner_of(row.recipe.method).require_known()
            except RecipeError as error:
                raise RecipeError(f"{row.spec}: {error}") from None
