"""Run cells. A cell is one training of one method with one seed, or one look at the base.

Each is a job (`turret.store.jobs`). A worker in this process does them one after another, or workers anywhere take them
from the queue. A cell whose time and memory are reported has a process of its own, and so has one that cannot share its
base. All other cells of a worker share one process, which loads their base once. Results of earlier calls are kept in
the comparison's folder and used again. Loads no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from turret.amounts import span
from turret.compare.design import Candidate, Cell
from turret.compare.results import CellResult
from turret.data import Dataset
from turret.database import OPEN_STATES, Database
from turret.disk import replace_text
from turret.errors import (
    Interrupted,
    InUse,
    QueueFull,
    RecipeError,
    StoreError,
    TrainingError,
    one_line,
    require_package,
)
from turret.json_types import JsonObject, Plain
from turret.location import Location
from turret.process import STORE_PREFIXES, environment
from turret.recipe import Recipe, toml_text
from turret.store import JobQueue, Store, leases
from turret.store.jobs import CellSpec, JobState, NewCell
from turret.store.leases import Lease, LeaseRenewer
from turret.tasks import Task, task_of
from turret.workspace.child_process import STOPPED, why_alone
from turret.workspace.progress import CellState, Progress, Say
from turret.workspace.queue_worker import Worker, WorkerLimits
from turret.workspace.queueing import Queue, placed_data

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# --- state ------------------------------------------------------------------------------------------------------------
# The files of a comparison. A killed comparison resumes from them: each cell's result is complete or missing.
#
# Under the store's root, `comparisons/<name>-<digest of recipe and data>/`:
#
# - `lock`: held by the process that conducts the comparison
# - `cells/<key>/recipe.toml`, `plan.json`: written by that process before its first step
# - `cells/<key>/result.json`: written atomically, after the version is stored and everything is measured
# - `report.html`, `report.md`, `report.json`: of all results so far
#
# Why a cell has no result is in its job (`turret.store.jobs`); the next call tries again.
#
# A comparison of a composition with its parts is in `comparisons/<name>+<name>-<digest of versions and data>/`. Its
# cells are the rows, and have a result only. Measurements of control have the same layout under `controls/`, and the
# classifier's training data in `references/`.
#
# A cell's key depends only on its recipe, so a later call with more methods, seeds or fractions uses the same results.


FORMAT = 1
TRIAL = "trial"  # the kind of a cell of a sweep


def folder_of(root: Path, recipe: Recipe, data_digest: str, kind: str = "comparisons") -> Path:
    """The folder of a comparison. It depends on the recipe's base, data and training settings, not on its method."""
    same = recipe.with_overrides({"method": "head", "train.lr": "none"})
    same = same.changed(train={"init_from": None, "trackers": None})
    digest = hashlib.sha256(f"{FORMAT}\n{same.to_toml()}\n{data_digest}".encode()).hexdigest()
    return root / kind / f"{recipe.name}-{digest[:10]}"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises StoreError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{path.name} cannot be written to {path.parent}: {reason}: free some space there") from None


def read_json(path: Path) -> JsonObject | None:
    """The contents of a JSON file; None if it does not exist. Raises StoreError if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({type(error).__name__}): delete it to run that cell again") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path} is not a JSON object: delete it to run that cell again")
    return value


# --- kept files -------------------------------------------------------------------------------------------------------


class KeptFiles:
    """Writes the files of a comparison.

    Args:
        store: has the comparison's folder under its root, and a copy of it if it is a store by URL.
        lease: of the comparison, which each write to the store checks; None for a folder store.
        keeper: renews the lease; None in the process of a cell.
    """

    def __init__(self, store: Store, lease: Lease | None = None, keeper: LeaseRenewer | None = None) -> None:
        self.store, self.lease, self._keeper = store, lease, keeper

    def write(self, path: Path, value: Mapping[str, Plain]) -> None:
        """Write a JSON file."""
        self.write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False))

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file. Raises LeaseLost if another process conducts the comparison by now."""
        write_text(path, text)
        self.store.artifacts.keep([path], self.lease)

    def require(self) -> None:
        """Raise LeaseLost if another process conducts the comparison by now."""
        if self._keeper is not None:
            self._keeper.require()


@contextmanager
def hold_comparison(store: Store, folder: Path, say: Say) -> Iterator[KeptFiles]:
    """Hold a comparison for this process: its folder by a lock, and with a store by URL also a lease.

    With a store by URL, the files that other machines wrote are copied to the folder first.

    Raises:
        StoreError: another process conducts it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=0):
            if not store.artifacts.copies:
                yield KeptFiles(store)
                return
            database, name = store.database(make=True), folder.relative_to(store.root).as_posix()
            lease = _take_lease(database, name, say)
            try:
                with LeaseRenewer(database, lease, warn=say) as keeper:
                    store.artifacts.bring(f"{name}/")
                    yield KeptFiles(store, lease, keeper)
            finally:
                with suppress(StoreError), database.writing() as connection:  # otherwise it ends by itself
                    leases.release(connection, lease)
    except Timeout:
        raise StoreError(f"another process runs the comparison in {folder}: wait for it, or end it") from None
    except OSError as error:
        raise StoreError(f"the comparison cannot be written to {folder}: {error.strerror or error}") from None


def _take_lease(database: Database, name: str, say: Say) -> Lease:
    if leases.is_free(database, name, say):
        with database.writing() as connection:
            if (lease := leases.take(connection, name)) is not None:
                return lease
    raise StoreError(f"another process runs the comparison {name}: wait for it, or end it")


# --- command ----------------------------------------------------------------------------------------------------------
# The command line that makes a report again: every setting of the recipe and of the request that is not a default.


def command(verb: str, recipe: Recipe, request: DataclassInstance) -> str:
    """`turret compare DATA --base B --name N --set train.epochs=1 --seeds 3`."""
    words = ["turret", verb, recipe.data.source, "--base", recipe.base, "--name", recipe.name]
    words += ["--seed", str(recipe.seed)]
    for key, value in _changes(recipe):
        words += ["--set", f"{key}={value}"]
    return shlex.join([*words, *_options(request)])


def _options(request: DataclassInstance) -> Iterator[str]:
    """The options that are not the default. A budget changes no result."""
    for each in fields(request):
        name, value = each.name.replace("_", "-"), getattr(request, each.name)
        if value == each.default or name == "budget":
            continue
        if value is False:
            yield f"--no-{name}"
        else:
            yield from (f"--{name}", ",".join(map(_plain, value if isinstance(value, tuple) else (value,))))


def _plain(value: str | float) -> str:
    return str(value).removesuffix(".0")


def _changes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, value) of every setting that is not the default, as `--set` reads them."""
    if recipe.method.kind != Recipe.model_fields["method"].default.kind:
        yield "method", recipe.method.kind
    changed = recipe.model_dump(mode="json", include={"data", "task", "method", "train"}, exclude_defaults=True)
    for table, settings in changed.items():
        for key, value in settings.items():
            if (table, key) not in (("data", "source"), ("method", "kind")):
                yield from _texts(f"{table}.{key}", value)


def _texts(key: str, value: Plain) -> Iterator[tuple[str, str]]:
    if key == "task.class_weights" and isinstance(value, Mapping):
        for name, number in value.items():
            yield f"{key}.{name}", f"{number:g}"
    elif value is None:
        yield key, "none"
    else:
        yield key, value if isinstance(value, str) else toml_text(value)


# --- cells ------------------------------------------------------------------------------------------------------------


RAY = "ray://"
POLL_SECONDS = 1.0  # between two looks at the cells of workers
LONG = 7 * 24 * 3600.0  # seconds: a cell of this process is not killed for its silence, as its user sees it
OWN = WorkerLimits(silent_seconds=LONG, stopping_seconds=LONG, own=True)
# Errors that every cell would meet, so the next one is not tried.
EVERYWHERE = ("BaseModelError", "UnknownFamily", "DataError", "StoreError", "LeaseLost", "Corrupt", "RecipeError")


class CellJobs:
    """The cells of a comparison or the trials of a sweep, as jobs.

    Args:
        store: gets every trained version.
        folder: of the comparison or sweep.
        say: called with a line of progress.
        files: writes the files of the folder.
        deadline: a value of `time.monotonic` at which the budget ends; None: no budget.
    """

    def __init__(
        self, store: Store, folder: Path, say: Say, files: KeptFiles, deadline: float | None, tasks: Workers | None
    ) -> None:
        self.store, self.folder, self.say, self.files, self.deadline = store, folder, say, files, deadline
        self._tasks, self._queue = tasks, JobQueue.of(store, make=True)
        self._worker: Worker | None = None  # of this process

    @property
    def _study(self) -> str:
        return self.folder.relative_to(self.store.root).as_posix()

    def _late(self, seconds: float = 0.0) -> bool:
        """Whether the budget ends within so many seconds."""
        return self.deadline is not None and time.monotonic() + seconds >= self.deadline

    def _spec(self, kind: str, key: str, source: str | None, *, alone: bool, needs: int | None = None) -> CellSpec:
        return {
            "kind": kind,
            "study": self._study,
            "key": key,
            "comparison": f"{self.folder.parent.name}/{self.folder.name}",
            "alone": alone,
            "needs": needs,
            "source": source,
        }

    def _do_here(self, job: str, say: Say, stop: Callable[[], bool]) -> JobState:
        """Have a job done by the worker of this process; see `Worker.run_one`."""
        if self._worker is None:
            self._worker = Worker(self.store, self.say, 1, OWN)
        self._worker.run_one(job, say, stop)
        return self._queue.states([job])[job]

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()


class CellRunner(CellJobs):
    """Runs the missing cells of a comparison, and collects the results of all its cells.

    Args:
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
        tasks: Workers | None = None,
        metric: str = "",
    ) -> None:
        super().__init__(store, folder, say, files or KeptFiles(store), deadline, tasks)
        self.timed, self._metric = timed, metric
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
            self._stop_worker()
        kept = [self.folder / "cells" / key / "result.json" for key in self.results]
        self.store.artifacts.keep(kept, self.files.lease)  # a result may be a copy of another seed's
        if not self.results:
            failures = "; ".join(f"{name}: {why}" for name, why in self.failures.items())
            raise TrainingError(f"nothing could be compared: {failures or 'the budget ended before the first run did'}")

    def _run_missing(self, cells: Sequence[Cell]) -> None:
        for number, cell in enumerate(cells, 1):
            name, here = cell.candidate.spec, self.folder / "cells" / cell.key
            result = read_json(here / "result.json") or self._of_another_seed(cell, here)
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

    def _wait_for(self, tasks: Workers, cells: Sequence[Cell]) -> None:
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
                for id in [id for id in waiting if states[id]["state"] not in OPEN_STATES]:
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

    def _submit(self, tasks: Workers, cells: Sequence[Cell], waiting: dict[str, Cell]) -> list[Cell]:
        """Submit cells that have no result, as many as the queue takes. Returns the others."""
        new, later = dict[str, list[Cell]](), list[Cell]()
        for cell in cells:
            here, alike = self.folder / "cells" / cell.key, (cell.candidate.spec, cell.fraction)
            result = read_json(here / "result.json") or self._of_another_seed(cell, here)
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
        result = read_json(self.folder / "cells" / cell.key / "result.json")
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
        # rows that train nothing take seconds: they say nothing about a training
        parts += [f"about {span(sum(known))} left"] if known and len(known) == len(expected) else []
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
                earlier = read_json(self.folder / "cells" / key / "result.json")
                if earlier and earlier.get("seedless"):
                    self.files.write(here / "result.json", earlier)
                    return earlier
        return None

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
        ended = self._do_here(id, lambda line: self.say(f"{title}: {line}"), self._late)
        result = read_json(here / "result.json")
        if result is None and ended["state"] == "failed":
            self._note_failure(cell, ended)
        return result

    def _new(self, cell: Cell, source: str | None) -> NewCell:
        """A cell as a job. source: of its data, if it is not that of the recipe."""
        alone, needs = not self._shares(cell), self._needed_bytes(cell)
        spec = self._spec(cell.candidate.kind, cell.key, source, alone=alone, needs=needs)
        return NewCell(cell.key, cell.recipe.name, cell.recipe.to_toml(), spec)

    def _note_failure(self, cell: Cell, ended: JobState) -> None:
        """Raises TrainingError for an error that every cell would meet."""
        if (ended["result"] or {}).get("kind") in EVERYWHERE:
            raise TrainingError(f"{cell}: {ended['error']}")
        why = ended["error"] or "its result is not in the store"
        self.failures.setdefault(cell.candidate.spec, f"seed {cell.seed}: {why}")

    def _shares(self, cell: Cell) -> bool:
        """Whether a cell runs in the process that loads its base once for all such cells."""
        return cell.seed != self.timed and why_alone(cell.recipe) is None

    def _needed_bytes(self, cell: Cell) -> int | None:
        """The bytes that a process of its own needed for such a cell. None: unknown, or on a GPU."""
        done = self.results.values()
        alike = [each.memory for each in done if each.spec == cell.candidate.spec and each.memory and not each.resident]
        elsewhere = any(each.made and not str(each.made["device"]).startswith("cpu,") for each in done)
        needed = [int(each["peak_bytes"] + each["measured"]["weights"]) for each in alike]
        return None if elsewhere else max(needed, default=None)


class Workers:
    """Who takes cells from the queue: the workers of the store, by themselves."""

    def begin(self, job: str, recipe: Recipe) -> None:
        """Have a job done that is in the queue."""

    def check(self) -> None:
        """Raise TrainingError if one cannot be done."""

    def tell(self, progress: Progress) -> None:
        """Learn how far all cells are; called about once a second."""

    def close(self) -> None:
        """End what was begun. Workers go on."""


def require_executor(on: str | Workers | None) -> None:
    """Raise RecipeError unless `on` names who can run cells."""
    if isinstance(on, str) and on != "workers" and not on.startswith(RAY):
        raise RecipeError(
            f"--on {on[:60]}: expected workers, which `turret worker` starts, or ray://HOST:PORT; leave it out to "
            "train here"
        )


def executor(on: str | Workers | None, store: Store, data: Dataset) -> AbstractContextManager[Workers | None]:
    """Who runs cells of this data; None: this process."""
    tasks = Workers() if isinstance(on, str) else on
    if isinstance(on, str) and on.startswith(RAY):
        tasks = RayTasks(on, store, task_of(data.kind), data.labels)
    return nullcontext() if tasks is None else closing(tasks)


def require_known(rows: Sequence[Candidate]) -> None:
    """Check methods of PEFT and their settings before anything is trained; only this check loads torch and PEFT."""
    for row in rows:
        if row.recipe.method.open_settings:
            from turret.adapters.tuners.tuner import tuner_of

            try:
                tuner_of(row.recipe.method).require_known()
            except RecipeError as error:
                raise RecipeError(f"{row.spec}: {error}") from None


# --- tasks of Ray -----------------------------------------------------------------------------------------------------
# Jobs as tasks of Ray: `--on ray://HOST:PORT`. No other code imports Ray.
#
# A task does one job of the store's queue, as `turret worker --job ID --exit` does. Ray starts it again if its worker
# or its node is lost; the job's lease and its checkpoint decide what is left to do. An error of the job itself is in
# the store, so the task succeeds. Results are in the store too: a driver that is killed loses none.


STARTS = 3  # tries to begin: Ray gives its own process for a driver half a minute to start
LOST = 3  # times that a task whose worker was lost is started again


def do_job(store: str, job: str) -> str | None:
    """The task: do a job of a store, with the files of runs in a folder of this node. Returns its state."""
    import ray

    where = Location.parse(store)
    node = where.local / f"ray-{ray.get_runtime_context().get_node_id()[:12]}"
    queue = Queue(Store(replace(where, local=node)))
    while (state := queue.work_one(job)) == "waiting":  # for another try
        pass
    return state


class RayTasks(Workers):
    """The tasks of one comparison or sweep.

    Args:
        address: such as `ray://head:10001`.
        task: of the recipes, whose heads have these labels: they tell how much memory a training needs.

    Raises:
        RecipeError: Ray is not installed or does not answer, or the store is a folder of this machine.
    """

    def __init__(self, address: str, store: Store, task: type[Task], labels: Sequence[str]) -> None:
        with require_package(f"--on {address[:60]}", "Ray", "pip install 'turret[ray]'", RecipeError):
            import ray
        if store.location.catalog is None:
            raise RecipeError(
                f"--on {address[:60]}: other machines cannot open the folder {store}: give a store by URL"
            )
        passed = {key: value for key, value in environment(store=True).items() if key.startswith(STORE_PREFIXES)}
        for left in reversed(range(STARTS)):
            try:
                ray.init(address, namespace="turret", log_to_driver=False, runtime_env={"env_vars": passed})
                break
            except (ConnectionError, RuntimeError, ValueError) as error:
                if not left:
                    why = one_line(str(error), 160)
                    raise RecipeError(f"--on {address[:60]}: Ray does not answer ({why}): is it running?") from None
        self._gpus = ray.cluster_resources().get("GPU", 0.0) > 0
        self._ray, self._store, self._kind, self._labels = ray, store, task, labels
        self._remote = ray.remote(do_job)
        self._tasks: dict[str, Hashable] = {}  # job -> the reference of its task

    def begin(self, job: str, recipe: Recipe) -> None:
        """Start the task of a job that is in the queue."""
        import torch

        from turret.workspace.resident import predicted_for

        device = recipe.train.device or "auto"
        gpu = device.startswith("cuda") or (device == "auto" and self._gpus)
        predicted = predicted_for(recipe, self._kind, self._labels, torch.device("cuda" if gpu else "cpu"))
        asked = {"num_cpus": 1, "num_gpus": int(gpu), "max_retries": LOST, "name": f"turret {job}"}
        if predicted is not None and not gpu:
            asked["memory"] = predicted.total
        self._tasks[job] = self._remote.options(**asked).remote(self._store.location.given, job)

    def check(self) -> None:
        """Raise TrainingError if Ray gave a task up. Whatever the job itself did is in the store."""
        if not self._tasks:
            return
        done, _ = self._ray.wait(list(self._tasks.values()), num_returns=len(self._tasks), timeout=0)
        for job in [job for job, task in self._tasks.items() if task in done]:
            try:
                self._ray.get(self._tasks.pop(job))
            except self._ray.exceptions.RayError as error:
                raise TrainingError(one_line(f"Ray could not run {job}: {error}", 280)) from None

    def close(self) -> None:
        """Leave Ray. Tasks that still run are ended, and their jobs go on with the next call."""
        self._ray.shutdown()
