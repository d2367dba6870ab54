"""Run cells. A cell is one training of one method with one seed, or one look at the base.

Each is a job (`turret.store.jobs`). A worker in this process does them one after another, or workers anywhere take them
from the queue. A cell whose time and memory are reported has a process of its own, and so has one that cannot share its
base. All other cells of a worker share one process, which loads their base once. Results of earlier calls are kept in
the comparison's folder and used again. Loads no torch.
"""

from __future__ import annotations

import itertools
import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Protocol

from turret.compare.candidates import Candidate
from turret.compare.design import Cell
from turret.compare.report_text import seconds as span
from turret.compare.results import CellResult
from turret.data import Dataset
from turret.errors import Interrupted, InUse, QueueFull, RecipeError, TrainingError
from turret.json_types import JsonObject, JsonValue, Plain
from turret.recipe import Data, Recipe
from turret.store import JobQueue, Store
from turret.store.jobs import CellSpec, JobState, NewCell
from turret.tasks import task_of
from turret.workspace.child_process import STOPPED, why_alone
from turret.workspace.comparing import kept_files
from turret.workspace.comparing.kept_files import KeptFiles
from turret.workspace.progress import CellState, Progress, Say
from turret.workspace.queue_worker import Worker, WorkerLimits
from turret.workspace.queueing import placed_data

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


def _as_json(value: Plain) -> JsonValue:
    return list(value) if isinstance(value, tuple) else value


def _texts(key: str, value: Plain) -> Iterator[tuple[str, str]]:
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


RAY = "ray://"
POLL_SECONDS = 1.0  # between two looks at the cells of workers
LONG = 7 * 24 * 3600.0  # seconds: a cell of this process is not killed for its silence, as its user sees it
OWN = WorkerLimits(silent_seconds=LONG, stopping_seconds=LONG, own=True)
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
        tasks: who runs the cells; None: this process does.
        metric: of the scores.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        say: Say,
        deadline: float | None = None,
        files: KeptFiles | None = None,
        timed: int | None = None,
        tasks: Tasks | None = None,
        metric: str = "",
    ) -> None:
        self._metric = metric
        self.store, self.folder, self.say, self.deadline = store, folder, say, deadline
        self.files, self.timed = files or KeptFiles(store), timed
        self._tasks, self._queue = tasks, JobQueue.of(store, make=True)
        self._worker: Worker | None = None  # of this process
        self.results: dict[str, CellResult] = {}  # by the cell's key
        self.failures: dict[str, str] = {}  # the candidate's spec -> one line
        self.missing: list[Cell] = []
        self.last = ""  # method and score of the previous cell

    def run(self, cells: Sequence[Cell]) -> None:
        """Run the missing cells in order until the budget ends. Raises TrainingError if there is no result at all."""
        try:
            if self._tasks is None:
                self._run_missing(cells)
            else:
                self._wait_for(self._tasks, cells)
        except KeyboardInterrupt:
            raise Interrupted(STOPPED) from None
        finally:
            if self._worker is not None:
                self._worker.stop()
        kept = [self.folder / "cells" / key / "result.json" for key in self.results]
        self.store.artifacts.keep(kept, self.files.lease)  # a result may be a copy of another seed's
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
            self._note_result(cell, result)

    def _note_result(self, cell: Cell, result: Mapping[str, Plain] | None) -> None:
        if result is not None:
            self.results[cell.key] = CellResult.of(cell, result)
            self.last = f"{cell.candidate.label} {100 * float(self.results[cell.key].scores.mean()):.1f}"
        else:
            self.missing.append(cell)

    def _wait_for(self, tasks: Tasks, cells: Sequence[Cell]) -> None:
        """Put the missing cells into the queue, and wait until workers have done them, or the budget ends."""
        left, waiting, said = list(cells), dict[str, Cell](), ""
        tasks.tell(self._progress(cells, {}))  # first: a cancel ends the cells that were told
        while left or waiting:
            self.files.require()
            left = self._submit(tasks, left, waiting)
            states = self._queue.states(waiting)
            tasks.tell(self._progress(cells, {cell.key: str(states[id]["state"]) for id, cell in waiting.items()}))
            try:
                tasks.check()
                for id in [id for id in waiting if states[id]["state"] not in ("waiting", "running")]:
                    self._collect(waiting.pop(id), states[id])
            except TrainingError:
                self._queue.cancel_cells(waiting)
                raise
            self._queue.cancel_cells(id for id, each in waiting.items() if each.candidate.spec in self.failures)
            if self._late():
                self._queue.cancel_cells(waiting)
                self.missing += [*left, *waiting.values()]
                return
            running = sum(each["state"] == "running" for each in states.values())
            line = f"{len(self.results)} of {len(cells)} done, {running} on workers"
            line += f"; last {self.last}" if self.last else ""
            if line != said:
                self.say(line)
            said = line
            if waiting:
                time.sleep(POLL_SECONDS)
        tasks.tell(self._progress(cells, {}))

    def _progress(self, cells: Sequence[Cell], states: Mapping[str, str]) -> Progress:
        """states: of the jobs of those that wait or run."""
        found = []
        for cell in cells:
            state = CellState(cell.key, cell.candidate.label, "waiting", cell.seed, cell.fraction)
            if (done := self.results.get(cell.key)) is not None:
                score, seconds = float(done.scores.mean()), done.wall_seconds
                state = replace(
                    state, state="finished", score=score, seconds=seconds, version=done.version, run=done.run
                )
            elif (why := self.failures.get(cell.candidate.spec)) is not None:
                state = replace(state, state="failed", error=why)
            else:
                state = replace(state, state=states.get(cell.key, "waiting"))
            found.append(state)
        return Progress(self._study, self._metric, len(cells), found)

    def _submit(self, tasks: Tasks, cells: Sequence[Cell], waiting: dict[str, Cell]) -> list[Cell]:
        """Submit cells that have no result, as many as the queue takes. Returns the others."""
        new, later = dict[str, list[Cell]](), list[Cell]()
        for cell in cells:
            here, alike = self.folder / "cells" / cell.key, (cell.candidate.spec, cell.fraction)
            result = kept_files.read(here / "result.json") or self._of_another_seed(cell, here)
            if result is not None or cell.candidate.spec in self.failures:
                self._note_result(cell, result)
            elif not cell.candidate.trains and any(
                alike == (each.candidate.spec, each.fraction)
                for each in (*waiting.values(), *itertools.chain(*new.values()))
            ):
                later.append(cell)  # one seed may tell for all
            else:
                new.setdefault(cell.recipe.data.source, []).append(cell)
        for source, group in new.items():
            at, place = placed_data(self.store, source)
            try:
                ids = self._queue.submit_cells(self._study, [self._new(each, at) for each in group], place=place)
            except QueueFull:
                if not waiting:
                    raise
                ids = []
            for id, cell in zip(ids, group, strict=False):
                tasks.begin(id, cell.recipe)
                waiting[id] = cell
            later += group[len(ids) :]
        return later

    def _collect(self, cell: Cell, ended: JobState) -> None:
        """Take the result of a cell that a worker has ended."""
        self.store.artifacts.bring(f"{self._study}/cells/{cell.key}/")
        result = kept_files.read(self.folder / "cells" / cell.key / "result.json")
        if result is None and ended["state"] != "cancelled":
            self._note_failure(cell, ended)
        self._note_result(cell, result)

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
        self.say(title)
        id, waits = "", False
        while not id:
            try:
                (id,) = self._queue.submit_cells(self._study, [self._new(cell, None)], here=True)
            except InUse as error:  # a process of an earlier call that saves its checkpoint, or a worker
                if self._late():
                    return None
                if not waits:
                    self.say(f"{title}: {error}")
                waits = True
                time.sleep(POLL_SECONDS)
        if self._worker is None:
            self._worker = Worker(self.store, self.say, 1, OWN)
        self._worker.run_one(id, lambda line: self.say(f"{title}: {line}"), self._late)
        result = kept_files.read(here / "result.json")
        ended = self._queue.states([id])[id]
        if result is None and ended["state"] == "failed":
            self._note_failure(cell, ended)
        return result

    def _new(self, cell: Cell, source: str | None) -> NewCell:
        """A cell as a job. source: of its data, if it is not that of the recipe."""
        spec: CellSpec = {
            "kind": cell.candidate.kind,
            "study": self._study,
            "key": cell.key,
            "comparison": f"{self.folder.parent.name}/{self.folder.name}",
            "alone": not self._shares(cell),
            "needs": self._needed(cell),
            "source": source,
        }
        return NewCell(cell.key, cell.recipe.name, cell.recipe.to_toml(), spec)

    @property
    def _study(self) -> str:
        return self.folder.relative_to(self.store.root).as_posix()

    def _note_failure(self, cell: Cell, ended: JobState) -> None:
        """Raises TrainingError for an error that every cell would meet."""
        if (ended["result"] or {}).get("kind") in EVERYWHERE:
            raise TrainingError(f"{cell}: {ended['error']}")
        why = ended["error"] or "its result is not in the store"
        self.failures.setdefault(cell.candidate.spec, f"seed {cell.seed}: {why}")

    def _shares(self, cell: Cell) -> bool:
        """Whether a cell runs in the process that loads its base once for all such cells."""
        return cell.seed != self.timed and why_alone(cell.recipe) is None

    def _needed(self, cell: Cell) -> int | None:
        """The bytes that a process of its own needed for such a cell. None: unknown, or on a GPU."""
        done = self.results.values()
        alike = [each.memory for each in done if each.spec == cell.candidate.spec and each.memory and not each.resident]
        elsewhere = any(each.made and not str(each.made["device"]).startswith("cpu,") for each in done)
        needed = [int(each["peak_bytes"] + each["measured"]["weights"]) for each in alike]
        return None if elsewhere else max(needed, default=None)


class Tasks(Protocol):
    """Who is asked to take cells from the queue: see `turret.workspace.ray_tasks`."""

    def begin(self, job: str, recipe: Recipe) -> None:
        """Have a job done that is in the queue."""

    def check(self) -> None:
        """Raise TrainingError if one cannot be done."""

    def tell(self, progress: Progress) -> None:
        """Learn how far all cells are; called about once a second."""

    def close(self) -> None:
        """End what was begun."""


class Workers:
    """The workers of the store: they take cells by themselves."""

    def begin(self, job: str, recipe: Recipe) -> None:
        """They look at the queue."""

    def check(self) -> None:
        """They may begin at any time."""

    def tell(self, progress: Progress) -> None:
        """Nobody watches."""

    def close(self) -> None:
        """They go on."""


def require_executor(on: str | Tasks | None) -> None:
    """Raise RecipeError unless `on` names who can run cells."""
    if isinstance(on, str) and on != "workers" and not on.startswith(RAY):
        raise RecipeError(
            f"--on {on[:60]}: expected workers, which `turret worker` starts, or ray://HOST:PORT; leave it out to "
            "train here"
        )


@contextmanager
def executor(on: str | Tasks | None, store: Store, data: Dataset) -> Iterator[Tasks | None]:
    """Who runs cells of this data; None: this process."""
    tasks = Workers() if isinstance(on, str) else on
    if isinstance(on, str) and on.startswith(RAY):
        from turret.workspace.ray_tasks import RayTasks

        tasks = RayTasks(on, store, task_of(data.kind), data.labels)
    try:
        yield tasks
    finally:
        if tasks is not None:
            tasks.close()


def require_known(rows: Sequence[Candidate]) -> None:
    """Check methods of PEFT and their settings before anything is trained; only this check loads torch and PEFT."""
    for row in rows:
        if row.recipe.method.open_settings:
            from turret.adapters.tuners.tuner import tuner_of

            try:
                tuner_of(row.recipe.method).require_known()
            except RecipeError as error:
                raise RecipeError(f"{row.spec}: {error}") from None
