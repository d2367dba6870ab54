"""A worker: takes trainings and cells from the queue, several at once, and has them done by other processes.

The worker holds the leases of the jobs and writes their logs. `turret.workspace.resident_trainer` is the kept process
in which jobs share bases; `turret.workspace.job_process` is the process of one that needs its base for itself. Both
write checkpoints and end when the worker ends. One that hangs, or a job that runs for longer than the worker allows, is
killed. If the kept process dies, its jobs go on alone, one after another, so that the one that ended it is found.

A comparison has a worker of its own, in its process, that takes the comparison's cells one by one (`Worker.run_one`).

A study that waits in the queue has a process too (`turret.workspace.studying`), which loads no torch. It waits for the
cells that it submits, so it takes no slot: the same worker may train them.

After a try that failed because of this machine or of the store's own places, the worker pauses, each time for longer,
so that another machine can take what waits.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from turret import process
from turret.access import ANY
from turret.database import CELL, OPEN_STATES, STUDY
from turret.errors import BadLocation, Interrupted, LeaseLost, NotFound, RecipeError, StoreError
from turret.process import kill_child
from turret.recipe import AUTO, Recipe
from turret.store import JobQueue, Store, leases
from turret.store.jobs import WORK, CellSpec, Entry, Job, StudySpec
from turret.store.leases import LeaseRenewer
from turret.workspace.child_process import (
    MACHINE,
    OUTAGE,
    PAUSED_SECONDS,
    SHORT,
    STOPPED,
    Failure,
    StartLine,
    StopLine,
    WorkerRequest,
    failure_of,
    never_stopped,
    silence_failure,
    start_child,
    status_of,
    why_alone,
)
from turret.workspace.child_process import POLL_SECONDS as CHILD_POLL_SECONDS
from turret.workspace.progress import Say, silent

CHILD = "turret.workspace.job_process"
TRAINER = "turret.workspace.resident_trainer"
CONDUCTOR = "turret.workspace.studying"
STUDIES = 4  # comparisons and sweeps that a worker conducts at once, beside its slots
POLL_SECONDS = 1.0  # between two looks at an empty queue
OUTAGE_SECONDS = 5.0  # after the store did not answer
MOST_OUTAGES = 12  # in a row, at the start and with `until_empty`
MOST_UNANSWERED = 6  # trainings in a row that ended in an outage, with `until_empty`
STOPPING_SECONDS = 60.0
SILENT_SECONDS = 3600.0  # without a word of a training
CLOSING_SECONDS = 10.0  # for a process, when all of its jobs have ended
PAUSE_SECONDS, MOST_PAUSE = 5.0, 300.0  # after the first try in a row that this machine failed; at most


@dataclass(frozen=True)
class WorkerLimits:
    """What a worker allows a training."""

    most_seconds: float | None = None  # of one try; None: any time
    silent_seconds: float = SILENT_SECONDS  # without a step or a stage
    bases: Sequence[str] = ANY  # patterns of the bases on the Hub that recipes may name
    stopping_seconds: float = STOPPING_SECONDS  # for the step and the checkpoint of a job that is told to stop
    own: bool = False  # the jobs are of this process: they read its files, as its current folder names them

    def as_request(self, store: Store, folder: str) -> WorkerRequest:
        """What a process of the worker is asked. folder: for data that is not this user's."""
        return {
            "local": str(store.root.absolute()),
            "silent": self.silent_seconds,
            "stopping": self.stopping_seconds,
            "bases": list(self.bases),
            "folder": None if self.own else folder,
        }


class Trainer(Protocol):
    """Where a worker has its jobs done, several at once: the kept process, or the process that serves."""

    def run(self, taken: Job, tell: Say, stop: Callable[[], bool]) -> Failure | None:
        """Train a run; see `WorkerProcess.run`."""

    def close(self) -> None:
        """End what runs, with checkpoints."""


class Worker:
    """The tries of this process.

    Args:
        trainer: where the runs are trained; None: a kept process.
        mine: whether this worker can train a run at all.
    """

    def __init__(
        self,
        store: Store,
        say: Say,
        slots: int,
        limits: WorkerLimits,
        trainer: Trainer | None = None,
        mine: Callable[[Entry], bool] = lambda entry: True,
    ) -> None:
        self._store, self._say, self._slots, self._limits = store, say, slots, limits
        self._queue = JobQueue.of(store, make=True)
        self.count = 0  # trainings that were taken
        self._tries: list[_Try] = []
        self._studies: list[_Try] = []
        self._conducts = trainer is None
        self._failures = self._outages = self._unanswered = 0  # in a row: by this machine; at a look; by the store
        self._pause_until = 0.0
        self._stopping, self._changed = threading.Event(), threading.Event()
        self._trainer = trainer or WorkerProcess(store, self._queue, limits, self._stopping)
        self._mine = mine
        self._one_alone = threading.Lock()

    def work(self, until_empty: bool) -> None:
        """Take trainings until nothing is due, or for ever. Raises Interrupted if one of them was interrupted."""
        while True:
            self._changed.clear()
            self._look_at_ended(until_empty)
            pause = max(0.0, self._pause_until - time.monotonic())
            if pause or len(self._tries) >= self._slots or any(each.alone for each in self._tries):
                self._changed.wait(pause or None)
                continue
            if self._conducts and len(self._studies) < STUDIES and (study := self._take(until_empty, (STUDY,))):
                self._studies.append(self._begin(study))
            taken = self._take(until_empty)
            if taken is not None:
                self._tries.append(self._begin(taken))
            elif until_empty and not self._tries and not self._studies and not self._outages:
                return
            elif not self._outages:
                self._changed.wait(POLL_SECONDS)

    def ask_to_stop(self) -> None:
        """Let `work` end soon, in its thread."""
        self._stopping.set()
        self._changed.set()

    def stop(self) -> None:
        """End all trainings with a checkpoint, and return them to the queue. Called when `work` has ended."""
        self.ask_to_stop()
        try:
            for each in (*self._tries, *self._studies):
                each.thread.join()
        finally:
            self._trainer.close()

    def finish(self, id: str) -> str:
        """Do one job of the queue, and return its state then. One that has ended is not done again.

        A process that has the job is waited for, as its machine may be lost.
        """
        while True:
            found = self._queue.states([id]).get(id)
            if found is None:
                raise NotFound(f"no job {ascii(id)[:60]}: `turret runs` lists trainings")
            if found["state"] not in OPEN_STATES:
                return str(found["state"])
            if self.run_one(id, self._say):
                return str(self._queue.states([id])[id]["state"])
            if self._stopping.wait(POLL_SECONDS):
                raise Interrupted(STOPPED)

    def run_next(self) -> str | None:
        """Do the next job. Returns its state then; None if nothing is due."""
        if (taken := self._queue.take()) is None:
            return None
        self._run_here(taken, self._say, never_stopped)
        return str(self._queue.states([taken.id])[taken.id]["state"])

    def run_one(self, id: str, say: Say, stop: Callable[[], bool] = never_stopped) -> bool:
        """Do one job, if it is due and nobody has it. It ends, or waits for another try. Returns whether it was done.

        Args:
            say: called with a line of progress, in this thread.
            stop: asked a few times a second; once it is true, the job writes a checkpoint and ends.

        Raises:
            Interrupted: it was interrupted.
        """
        if stop() or (taken := self._queue.take_one(id)) is None:
            return False
        self._run_here(taken, say, stop)
        return True

    def _run_here(self, taken: Job, say: Say, stop: Callable[[], bool]) -> None:
        lines = SimpleQueue[str]()
        attempt = self._begin(taken, lines.put, stop)
        self._tries.append(attempt)
        while attempt.thread.is_alive() or not lines.empty():
            with suppress(Empty):
                say(lines.get(timeout=CHILD_POLL_SECONDS))
        self._tries.remove(attempt)
        if self._stopping.is_set():
            raise Interrupted(STOPPED)
        if attempt.again_alone and not stop() and (again := self._queue.take_one(taken.id)) is not None:
            self._run_here(again, say, stop)

    def _take(self, until_empty: bool, kinds: Sequence[str] = WORK) -> Job | None:
        try:
            if self._outages:  # owners of leases that have ended in the outage renew them first
                self._store.last_move()
                self._stopping.wait(leases.lease_seconds() / 2)
            accepts = self._accepts if kinds == WORK else accept_any
            taken, self._outages = self._queue.take(accepts, self._mine, kinds), 0
        except BadLocation:
            raise
        except StoreError as error:
            self._outages += 1
            if until_empty and self._outages >= MOST_OUTAGES:
                raise
            if self._outages == 1:
                self._say(f"{error}; trying again")
            self._stopping.wait(OUTAGE_SECONDS)
            return None
        return taken

    def _accepts(self, entry: Entry) -> bool:
        """Whether a job may begin now. One that needs its base for itself waits until nothing else runs here."""
        return not self._tries or (not entry.died_beside and can_share(entry.recipe, entry.spec))

    def _begin(self, taken: Job, say: Say | None = None, stop: Callable[[], bool] = never_stopped) -> _Try:
        """Begin a try. say: called with its lines; None: the worker says them, and that the try begins."""
        self.count += 1
        tell = silent if say is not None else self._say
        tell(f"run {taken.id}, try {taken.tries}")
        trainer = None if taken.alone or not can_share(taken.recipe, taken.spec) else self._trainer
        if taken.kind == STUDY:
            trainer = None
        elif trainer is None:
            self._make_room(taken)
        new = _Try(self, taken, tell, say or self._say, stop, trainer)
        new.thread.start()
        return new

    def _make_room(self, taken: Job) -> None:
        """End the kept process before a cell that is measured, unless there is memory for both."""
        if taken.spec is not None:
            needed = taken.spec["needs"] if "key" in taken.spec else None
            if needed is None or needed > process.free_memory():
                self._trainer.close()

    def _look_at_ended(self, until_empty: bool) -> None:
        """Count the tries that failed because of this machine or the store, and pause after them."""
        self._studies = [each for each in self._studies if not each.over]
        for each in [each for each in self._tries if each.over]:
            self._tries.remove(each)
            self._failures = self._failures + 1 if each.failed else 0
            self._unanswered = self._unanswered + 1 if each.failed == OUTAGE else 0
            if until_empty and self._unanswered >= MOST_UNANSWERED:
                raise StoreError(
                    f"the store did not answer {self._unanswered} trainings in a row: see `turret runs`; try later"
                )
            if each.failed:
                pause = min(MOST_PAUSE, PAUSE_SECONDS * 2 ** (self._failures - 1))
                self._say(f"pausing for {pause:g} s, because this machine or the store failed")
                self._pause_until = time.monotonic() + pause
        if self._stopping.is_set():
            raise Interrupted(STOPPED)


def start_worker(store: Store, say: Say, slots: int, limits: WorkerLimits) -> Worker:
    """A worker, once the store answers: PostgreSQL may start beside it, or be restarted.

    Raises:
        StoreError: the store does not answer for a minute, or may not be written.
    """
    outages = 0
    while True:
        try:
            if not store.writable():
                raise StoreError(
                    f"store {store} is read-only here: a worker writes to it; give permission, or another --store"
                )
            return Worker(store, say, slots, limits)
        except StoreError as error:
            outages += 1
            if not error.outage or outages == MOST_OUTAGES:
                raise
            if outages == 1:
                say(f"{error}; trying again")
        time.sleep(OUTAGE_SECONDS)


def accept_any(_: Entry) -> bool:
    """Whether a study may begin beside what runs."""
    return True


def can_share(recipe: str, spec: CellSpec | StudySpec | None = None) -> bool:
    """Whether a training of this recipe (TOML) shares its base. A broken one has a process that says what is wrong.

    Args:
        spec: of a cell, which may have to be alone.
    """
    try:
        return (
            not (spec is not None and "key" in spec and spec["alone"]) and why_alone(Recipe.from_toml(recipe)) is None
        )
    except RecipeError:
        return False


# --- a process --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Died(Failure):
    """The process died while it trained several. Nobody knows which of them ended it."""


@dataclass
class _Child:
    """A process that was started."""

    process: subprocess.Popen[str]
    folder: tempfile.TemporaryDirectory[str]  # for its stderr and its data
    listener: threading.Thread = field(init=False)  # hears it, and removes the folder
    problem: Failure | None = None  # why this process killed it


@dataclass
class _Hosted:
    """A run in a child."""

    child: _Child
    tell: Say
    heard: float = field(default_factory=time.monotonic)  # when it last gave a sign of life
    over: threading.Event = field(default_factory=threading.Event)
    status: int = 0
    ended: Failure | None = None


class WorkerProcess:
    """A process that does jobs. It starts with the first of them, and again after its death.

    Args:
        stopping: whether the worker ends.
        module: of the process. Only the kept one, in which trainings share bases, does several jobs.
    """

    def __init__(
        self, store: Store, queue: JobQueue, limits: WorkerLimits, stopping: threading.Event, module: str = TRAINER
    ) -> None:
        self._store, self._queue, self._limits = store, queue, limits
        self._stopping, self._module = stopping, module
        self._lock = threading.Lock()
        self._hosted: dict[str, _Hosted] = {}
        self._child: _Child | None = None

    def run(self, taken: Job, tell: Say, stop: Callable[[], bool]) -> Failure | None:
        """Do a job in the process.

        Args:
            stop: asked a few times a second; once it is true, the run shall write a checkpoint and end.

        Returns:
            Why it failed; None if it succeeded or ended as it was told to.

        Raises:
            Interrupted: somebody else stopped the process.
            StoreError: the run did not begin, because the store does not answer.
        """
        queued = list(wanted_bases(self._queue.waiting_recipes()))
        with self._lock:
            if self._hosted:  # before it is so: the process may die at any time
                self._queue.set_beside([*self._hosted, taken.id])
            hosted = self._hosted[taken.id] = _Hosted(self._running(), tell)
            self._send(hosted.child, {"start": taken.as_json(), "queued": queued})
        told = self._wait(taken.id, hosted, stop)
        if told and hosted.ended is not hosted.child.problem:  # which is that it was silent
            return None
        if hosted.status == Interrupted.exit_status:
            raise Interrupted(STOPPED)
        return hosted.ended

    def close(self) -> None:
        """End the process; one that still trains ends by itself, when its runs have written their checkpoints."""
        with self._lock:
            child, self._child = self._child, None
        if child is None:
            return
        assert child.process.stdin is not None
        with suppress(OSError):
            child.process.stdin.close()
        if not self._hosted:
            try:
                child.process.wait(CLOSING_SECONDS)
            except subprocess.TimeoutExpired:
                kill_child(child.process)
            child.listener.join(CLOSING_SECONDS)

    def _running(self) -> _Child:
        """The process; a new one if there is none."""
        if self._child is None or self._child.process.poll() is not None:
            folder = tempfile.TemporaryDirectory(prefix="turret-", ignore_cleanup_errors=True)
            data = Path(folder.name) / "data"
            data.mkdir()
            request = json.dumps(self._limits.as_request(self._store, str(data)))
            with (Path(folder.name) / "stderr.txt").open("w") as errors:
                child = _Child(start_child(self._module, request, errors, self._store.location), folder)
            child.listener = threading.Thread(target=self._listen, args=[child], name="turret-trainer", daemon=True)
            child.listener.start()
            self._child = child
        return self._child

    def _send(self, child: _Child, line: StartLine | StopLine) -> None:
        assert child.process.stdin is not None
        with suppress(OSError, ValueError):  # it has died, which `_listen` finds
            child.process.stdin.write(json.dumps(line) + "\n")
            child.process.stdin.flush()

    def _wait(self, run: str, hosted: _Hosted, stop: Callable[[], bool]) -> bool:
        """Wait for the end of a run. Returns whether it was told to stop."""
        told, polled = None, time.monotonic()
        while not hosted.over.wait(CHILD_POLL_SECONDS):
            now = time.monotonic()
            if now - polled > PAUSED_SECONDS:  # it is given the time in which this process heard nothing
                hosted.heard += now - polled
            polled = now
            if told is None and stop():
                told = now
                with self._lock:
                    self._send(hosted.child, {"stop": run})
            late = told is not None and now - told > self._limits.stopping_seconds
            if late and (self._stopping.is_set() or len(self._hosted) == 1):  # else others would be killed too
                kill_child(hosted.child.process)
            elif now - hosted.heard > self._limits.silent_seconds:
                hosted.child.problem = silence_failure(self._limits.silent_seconds)
                kill_child(hosted.child.process)
        return told is not None

    def _listen(self, child: _Child) -> None:
        """Pass on what a process says, until it ends; then all of its runs have ended."""
        assert child.process.stdout is not None
        try:
            with child.process.stdout as lines:
                for line in lines:
                    self._hear(line)
        except BaseException:  # a line could not be passed on
            kill_child(child.process)
            raise
        finally:
            self._end(child)

    def _hear(self, line: str) -> None:
        try:
            said = json.loads(line)
            hosted = self._hosted.get(said["run"])
        except (ValueError, TypeError, KeyError):
            return
        if hosted is None:
            return
        hosted.heard = time.monotonic()
        if "stage" in said:
            hosted.tell(said["stage"])
        if "status" in said:
            hosted.status, text = said["status"], said["text"]
            if text is not None:
                hosted.tell(text)
            if hosted.status:
                hosted.ended = Failure(text or STOPPED, hosted.status)
            with self._lock:
                del self._hosted[said["run"]]
            hosted.over.set()

    def _end(self, child: _Child) -> None:
        status = child.process.wait()
        text = (Path(child.folder.name) / "stderr.txt").read_text(errors="replace")
        failure = child.problem or failure_of(status, [each.strip() for each in text.splitlines() if each.strip()])
        with self._lock:
            left = {run: each for run, each in self._hosted.items() if each.child is child}
            for run in left:
                del self._hosted[run]
        for each in left.values():
            each.ended = failure if len(left) == 1 else Died(failure.text, failure.status)
            each.over.set()
        child.folder.cleanup()


def wanted_bases(recipes: Iterable[str]) -> set[str]:
    """The names of the bases in some recipes (TOML); `auto` stands for any."""
    found = set()
    for text in recipes:
        with suppress(tomllib.TOMLDecodeError):
            found.add(str(tomllib.loads(text).get("base", AUTO)))
    return found


# --- a try ------------------------------------------------------------------------------------------------------------


class _Try:
    """One try of a job, in a thread.

    Args:
        tell: called with what becomes of it.
        say: called with its lines.
        stop: asked a few times a second; once it is true, the job shall write a checkpoint and end.
        trainer: the kept process that does it; None: it needs a process of its own.
    """

    def __init__(
        self, worker: Worker, taken: Job, tell: Say, say: Say, stop: Callable[[], bool], trainer: Trainer | None
    ) -> None:
        self._store, self._queue, self._limits = worker._store, worker._queue, worker._limits
        self._one_alone, self._stopping, self._ended = worker._one_alone, worker._stopping, worker._changed.set
        self._taken, self._told, self._say, self._stop, self._trainer = taken, tell, say, stop, trainer
        self._lines: list[str] = []  # not yet in the log
        self._lock, self._asked, self._over = threading.Lock(), threading.Event(), threading.Event()
        self._begun = time.monotonic()
        self.alone = trainer is None  # nothing else may begin beside it
        self.over = False
        self.again_alone = False  # it is a cell that waits for a process of its own
        self.failed: int | None = None  # OUTAGE or MACHINE, if it failed because of them
        self.thread = threading.Thread(target=self._run, name=f"turret try of {taken.id}", daemon=True)

    def _run(self) -> None:
        try:
            self.failed = self._run_to_end()
        finally:
            self.over = True
            self._ended()

    def _run_to_end(self) -> int | None:
        """Run the training. Returns OUTAGE or MACHINE if it failed because of them."""
        taken, problem = self._taken, None
        try:
            problem = self._run_child()
        except Interrupted:
            self._stopping.set()
        except StoreError as error:  # the last lines of the log
            self._told(f"run {taken.id}: {error}")
        while True:
            try:
                state = self._record(problem)
                break
            except StoreError as error:
                if self._stopping.is_set():
                    return None  # its lease ends
                if not error.outage:
                    self._told(f"run {taken.id}: {error}")
                    return MACHINE
                self._stopping.wait(OUTAGE_SECONDS)  # this worker has the run, until another one takes it
        self._told(f"run {taken.id} is {state}")
        if problem is None or problem.status is None or self.again_alone:
            return None
        if problem.status < 0:  # the system killed it
            return MACHINE
        return problem.status if problem.status in (OUTAGE, MACHINE) else None

    def _run_child(self) -> Failure | None:
        with LeaseRenewer(self._store.database(), self._taken.lease, turn=self._turn, warn=self._told) as keeper:

            def stop() -> bool:
                asked = self._stopping.is_set() or self._asked.is_set() or keeper.lost or self._stop()
                return asked or self._took_too_long()

            trainer = self._trainer
            problem = self._run_in(trainer, stop) if trainer is not None else self._run_own_process(stop)
            if isinstance(problem, Died):
                problem = self._go_on_alone(problem, stop)
            killed = problem is not None and problem.status is not None and problem.status < 0
            shared = self._trainer is not None and not self.alone and self._taken.kind == CELL
            self.again_alone = shared and problem is not None and (killed or problem.status == SHORT)
            if problem is not None and (problem.status is None or problem.status < 0):
                self._tell(problem.text)  # its process was killed, and could not say it
            return problem

    def _run_in(self, trainer: Trainer, stop: Callable[[], bool]) -> Failure | None:
        try:
            return trainer.run(self._taken, self._tell, stop)
        except StoreError as error:
            return Failure(str(error), status_of(error))

    def _go_on_alone(self, died: Died, stop: Callable[[], bool]) -> Failure | None:
        """Go on in a process of its own, when it is the turn of this run among those whose process has died."""
        self.alone = True
        self._tell(f"{died.text}; it trained others too, so this training goes on alone")
        try:
            self._queue.hold_alone(self._taken)
        except LeaseLost:
            return None
        except StoreError as error:
            return Failure(str(error), status_of(error))
        while not self._one_alone.acquire(timeout=CHILD_POLL_SECONDS):
            if stop():
                return None
        try:
            self._begun = time.monotonic()
            return None if stop() else self._run_own_process(stop)
        finally:
            self._one_alone.release()

    def _run_own_process(self, stop: Callable[[], bool]) -> Failure | None:
        study = self._taken.kind == STUDY  # it is silent while it waits for cells
        limits = replace(self._limits, silent_seconds=math.inf) if study else self._limits
        module = CONDUCTOR if study else CHILD
        with closing(WorkerProcess(self._store, self._queue, limits, self._stopping, module)) as own:
            return self._run_in(own, stop)

    def _tell(self, line: str) -> None:
        self._say(f"run {self._taken.id}: {line}")
        with self._lock:
            self._lines.append(line)

    def _turn(self, over: bool) -> None:
        """Write the new lines to the log, and see whether the end of the run was asked for."""
        with self._lock:
            new, self._lines[:] = list(self._lines), []
        try:
            if self._queue.write_log(self._taken, new, last=over):
                self._asked.set()
        except BaseException:
            with self._lock:
                self._lines[:0] = new
            raise

    def _took_too_long(self) -> bool:
        """End the run if its time is over, before its process is told to stop, which would return it to the queue."""
        most = None if self._taken.kind == STUDY else self._limits.most_seconds
        if most is None or time.monotonic() < self._begun + most or self._over.is_set():
            return self._over.is_set()
        hours = most / 3600
        line = f"it took more than {hours:g} hours, the limit of its worker (--most-hours): train for fewer steps"
        try:
            self._queue.end_try(self._taken, line, again=False)
        except LeaseLost:
            pass
        except StoreError:
            return False  # an outage: again soon
        self._tell(line)
        self._over.set()
        return True

    def _record(self, problem: Failure | None) -> str:
        """Record a try that ended without a word of its process, which otherwise records its end itself.

        Returns:
            The state of the run.
        """
        text, taken = None if problem is None else problem.text, self._taken
        outage = problem is not None and problem.status == OUTAGE
        try:
            if self.again_alone:
                self._queue.return_alone(taken, text)
                return "waiting for a process of its own"
            state = self._queue.end_try(taken, text, outage=outage)
        except LeaseLost:
            return "taken over by another worker, or ended"
        return state or str(self._queue.states([taken.id])[taken.id]["state"])
