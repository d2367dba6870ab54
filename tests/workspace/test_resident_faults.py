"""Around resident trainings: a reader of data dies, a run is queued while a thread falls asleep, code has a mistake."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shelf import Shelf
from workspace.test_comparing import recipe_in

from turret.data import Dataset
from turret.engine.core import Engine
from turret.errors import DataError, StoreError
from turret.recipe import Recipe
from turret.store import JobQueue, Store
from turret.store.jobs import Job
from turret.train.curve import StepRecord
from turret.workspace import Workspace, queue_worker
from turret.workspace.child_process import Failure
from turret.workspace.data_readers import DataReaders
from turret.workspace.job_process import Trial, carry_out
from turret.workspace.progress import Say
from turret.workspace.queue_worker import Worker, WorkerLimits
from turret.workspace.resident import PassThread, ResidentBases, Room, Seat
from turret.workspace.resident_trainer import _Run
from turret.workspace.training import Callbacks

ROWS = 40_000  # take a second to read


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# --- readers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[DataReaders]:
    (tmp_path / "readers").mkdir()
    made = DataReaders(Store(tmp_path / "store"), 120, folder=tmp_path / "readers")
    yield made
    for each in made._idle:
        each.close()


def queued(folder: Path, rows: int) -> Job:
    """A run whose data has so many rows, taken from the queue."""
    recipe, lines = recipe_in(folder), ["text,label", *(f"a great film {row},good" for row in range(rows - 2))]
    (folder / "reviews.csv").write_text("\n".join([*lines, "a dull film,bad", "boring,bad"]))
    workspace = Workspace(folder / "store")
    workspace.queue.submit(recipe)
    taken = JobQueue.of(workspace.store).take()
    assert taken is not None
    return taken


class Reading(threading.Thread):
    """A reading in a thread, with the files that its process has begun to write."""

    def __init__(self, readers: DataReaders, taken: Job) -> None:
        super().__init__(daemon=True)
        self._readers, self._taken = readers, taken
        self.found: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.found = self._readers.read(self._taken, lambda: False)
        except (DataError, StoreError) as error:
            self.found = error


def working(folder: Path) -> set[int]:
    """The processes whose working folder is in that of a reading: they are in the middle of it."""
    found = set()
    for each in Path("/proc").glob("[0-9]*"):
        try:
            where = (each / "cwd").readlink()
        except OSError:
            continue
        if where.is_relative_to(folder):
            found.add(int(each.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process in Linux's /proc")
def test_data_whose_reader_is_killed_is_read_again_and_a_crash_ends_its_run_alone(
    tmp_path: Path, readers: DataReaders
) -> None:
    """Killed once, by the system: read again. Killed twice, or crashed: one line. Another run reads meanwhile."""
    taken = queued(tmp_path, ROWS)
    whole = readers.read(taken, lambda: False)

    def struck(*signals: signal.Signals) -> Any:
        reading, struck = Reading(readers, taken), set[int]()
        until(lambda: any(readers._folder.iterdir()))
        (folder,) = readers._folder.iterdir()
        neighbour = Reading(readers, taken)
        for each in signals:
            until(lambda: working(folder) - struck)
            (process,) = working(folder) - struck
            struck.add(process)
            os.kill(process, each)
        reading.join(120)
        neighbour.join(120)
        assert neighbour.found.digest == whole.digest
        return reading.found

    assert struck().digest == whole.digest, "the control"
    assert struck(signal.SIGKILL).digest == whole.digest
    crashed, twice = struck(signal.SIGSEGV), struck(signal.SIGKILL, signal.SIGKILL)
    assert isinstance(crashed, DataError)
    assert str(crashed).startswith("the data was not read: it ended its process: check the file")
    assert isinstance(twice, StoreError), "another try may succeed"
    assert "its process was killed twice; try again" in str(twice)
    assert readers.read(taken, lambda: False).digest == whole.digest
    assert not list(readers._folder.iterdir()), "the files of the dead readers are removed"


# --- falling asleep ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trainer", "engine"])
def test_a_part_that_is_queued_while_the_thread_falls_asleep_is_started(kind: str) -> None:
    """2,000 parts that come one by one, each when the thread has just found nothing. Control: a thread not woken."""
    place: PassThread | Engine = PassThread() if kind == "trainer" else Shelf("bert").engine()
    done: list[int] = []

    def ask(seed: int, count: int) -> None:
        pauses = random.Random(seed)
        for _ in range(count):
            time.sleep(pauses.choice((0.0, 1e-5, 1e-4, 3e-4)))
            done.append(place.run(lambda: 1))

    threads = [threading.Thread(target=ask, args=[seed, 1000], daemon=True) for seed in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len(done) == 2000

    time.sleep(0.1)  # it sleeps
    wake = place._wake.notify_all
    place._wake.notify_all = lambda: None  # type: ignore[method-assign]
    deaf = threading.Thread(target=ask, args=[0, 1], daemon=True)
    deaf.start()
    deaf.join(0.5)
    assert deaf.is_alive(), "the control"
    place._wake.notify_all = wake  # type: ignore[method-assign]
    with place._wake:
        place._wake.notify_all()
    deaf.join(60)
    assert len(done) == 2001
    place.close()


class Instant:
    """Ends every run at once."""

    def __init__(self, queue: JobQueue, ended: Callable[[], None]) -> None:
        self._queue, self._ended, self._pauses = queue, ended, random.Random(0)

    def run(self, taken: Job, tell: Say, stop: Callable[[], bool]) -> Failure | None:
        time.sleep(self._pauses.choice((0.0, 1e-3, 5e-3)))
        self._queue.end_try(taken, "done", again=False)
        self._ended()
        return Failure("done", 1)

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_a_run_that_is_queued_while_its_worker_falls_asleep_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one slot the worker sleeps until a run ends; each end queues the next run. No look at the clock helps it."""
    monkeypatch.setattr(queue_worker, "POLL_SECONDS", 0.01)
    (tmp_path / "bert").mkdir()
    workspace, recipe, runs = Workspace(tmp_path / "store"), recipe_in(tmp_path), 40
    submitted: list[str] = []

    def submit() -> None:
        if len(submitted) < runs:
            submitted.append(workspace.queue.submit(recipe.with_overrides({"seed": str(len(submitted))}))["id"])

    submit()
    submit()
    worker = Worker(workspace.store, lambda _: None, 1, WorkerLimits(), Instant(JobQueue.of(workspace.store), submit))
    thread = threading.Thread(target=worker.work, args=[True], daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    assert worker.count == runs
    assert {workspace.run(run)["state"] for run in submitted} == {"failed"}


# --- mistakes in the code ---------------------------------------------------------------------------------------------


def test_an_unexpected_error_ends_a_queued_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is recorded, so that the run is tried again. The traceback is for TURRET_DEBUG=1 alone."""

    def broken(recipe: Recipe) -> Dataset:
        raise ZeroDivisionError("first line\nsecond line " + "x" * 1000)

    for debug in ("", "1"):
        folder = tmp_path / f"debug{debug}"
        folder.mkdir()
        monkeypatch.setenv("TURRET_DEBUG", debug)
        taken = queued(folder, 10)
        store = Store(folder / "store")
        capfd.readouterr()
        ended = carry_out(store, taken, ("*",), Trial(Callbacks(), broken))
        assert ended.status == 1
        assert ended.text is not None
        assert ended.text.startswith("this is a bug in turret (ZeroDivisionError: first line second line")
        assert "\n" not in ended.text
        assert len(ended.text) <= 300
        assert ("Traceback" in capfd.readouterr().err) == (debug == "1")
        run = store.run(taken.id)
        assert (run["state"], run["error"]) == ("waiting", ended.text)


# --- memory -----------------------------------------------------------------------------------------------------------


class Cycle:
    """Refers to itself, so only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_the_first_step_of_a_run_frees_what_its_preparation_left(tmp_path: Path) -> None:
    taken = queued(tmp_path, 4)
    run = _Run(taken, threading.Event())
    run.seat = Seat(ResidentBases(thread=None), Room(), list, run.asked)
    step = StepRecord(7, 9, 0.5, 1.25, 1e-3, 0.3, 8, 100, 0.5, 200.0, 1000)  # the first one here: it was resumed
    gc.disable()
    try:
        left = weakref.ref(Cycle())
        run.heard(None)
        assert left() is not None  # a stage frees nothing
        run.heard(step)
        assert left() is None
        later = weakref.ref(Cycle())
        run.heard(step)
        assert later() is not None  # further steps are not delayed
    finally:
        gc.enable()


TRAINER = """
import gc, json
from turret.workspace import resident_trainer
asked = {"local": "store", "silent": 60.0, "stopping": 60.0, "bases": ["*"], "folder": "."}
resident_trainer.main(json.dumps(asked))
print(gc.get_freeze_count(), len(gc.get_objects()))
"""


@pytest.mark.slow
def test_the_process_of_resident_trainings_collects_no_objects_of_libraries(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINER],
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | {"TURRET_STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        check=True,
    )
    exempt, others = map(int, done.stdout.split())
    assert exempt > 100_000  # torch and transformers are loaded
    assert others < exempt / 10
