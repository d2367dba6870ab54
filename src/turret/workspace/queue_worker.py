"""A worker: takes trainings from the queue, one after another, and runs each in a process of its own.

The worker holds the lease of a run and writes its log. `turret.workspace.queued_training` is the process that trains.
It ends, with a checkpoint, when the worker ends. If it hangs, or runs for longer than the worker allows, it is killed.
After a try that failed because of this machine or of the store's own places, the worker pauses, each time for longer,
so that another machine can take what waits.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from turret.access import ANY, Access, check_patterns
from turret.errors import BadLocation, Interrupted, LeaseLost, StoreError
from turret.process import stop_on_sigterm
from turret.store import Store, TrainingQueue, leases
from turret.store.leases import LeaseRenewer
from turret.store.queue import QueuedRun
from turret.workspace.child_process import MACHINE, OUTAGE, Failure, Patience, run_child
from turret.workspace.progress import Say

CHILD = "turret.workspace.queued_training"
POLL_SECONDS = 1.0  # between two looks at an empty queue
OUTAGE_SECONDS = 5.0  # after the store did not answer
MOST_OUTAGES = 12  # in a row, with `until_empty`
MOST_UNANSWERED = 6  # trainings in a row that ended in an outage, with `until_empty`
STOPPING_SECONDS = 60.0  # for the step and the checkpoint of a training that is told to stop
SILENT_SECONDS = 3600.0  # without a word of a training
PAUSE_SECONDS, MOST_PAUSE = 5.0, 300.0  # after the first try in a row that this machine failed; at most


@dataclass(frozen=True)
class WorkerLimits:
    """What a worker allows a training."""

    most_seconds: float | None = None  # of one try; None: any time
    silent_seconds: float = SILENT_SECONDS  # without a step or a stage
    bases: Sequence[str] = ANY  # patterns of the bases on the Hub that recipes may name


def work(store: Store, say: Say, *, until_empty: bool, limits: WorkerLimits = WorkerLimits()) -> int:
    """Take and run trainings until a signal, or until nothing is due. Returns how many were taken."""
    stop_on_sigterm()
    check_patterns(["*"], limits.bases)
    if not store.writable():
        raise StoreError(f"store {store} is read-only here: a worker writes to it; give permission, or another --store")
    queue, count = TrainingQueue.of(store, make=True), 0
    failures = outages = unanswered = 0  # in a row: tries by this machine; looks at the queue; tries by the store
    try:
        while True:
            try:
                if outages:  # owners of leases that have ended in the outage renew them first
                    store.last_move()
                    time.sleep(leases.length() / 2)
                taken, outages = queue.take(), 0
            except BadLocation:
                raise
            except StoreError as error:
                outages += 1
                if until_empty and outages >= MOST_OUTAGES:
                    raise
                if outages == 1:
                    say(f"{error}; trying again")
                time.sleep(OUTAGE_SECONDS)
                continue
            if taken is None:
                if until_empty:
                    return count
                time.sleep(POLL_SECONDS)
                continue
            count += 1
            say(f"run {taken.run}, try {taken.tries}")
            failed = _Try(store, queue, taken, say, limits).run()
            failures = failures + 1 if failed else 0
            unanswered = unanswered + 1 if failed == OUTAGE else 0
            if until_empty and unanswered >= MOST_UNANSWERED:
                raise StoreError(
                    f"the store did not answer {unanswered} trainings in a row: see `turret runs`; try later"
                )
            if failures:
                pause = min(MOST_PAUSE, PAUSE_SECONDS * 2 ** (failures - 1))
                say(f"pausing for {pause:g} s, because this machine or the store failed")
                time.sleep(pause)
    except (KeyboardInterrupt, Interrupted):
        say("stopped")
        return count


class _Try:
    """One try of a training."""

    def __init__(self, store: Store, queue: TrainingQueue, taken: QueuedRun, say: Say, limits: WorkerLimits) -> None:
        self._store, self._queue, self._taken, self._say, self._limits = store, queue, taken, say, limits
        self._lines: list[str] = []  # not yet in the log
        self._lock, self._asked, self._over = threading.Lock(), threading.Event(), threading.Event()
        self._end = None if limits.most_seconds is None else time.monotonic() + limits.most_seconds

    def run(self) -> int | None:
        """Run the training. Returns OUTAGE or MACHINE if it failed because of them."""
        taken, problem = self._taken, None
        try:
            problem = self._run_child()
        except (KeyboardInterrupt, Interrupted):
            with suppress(StoreError):  # otherwise its lease ends
                self._record(None)
            raise
        except StoreError as error:  # the last lines of the log
            self._say(f"run {taken.run}: {error}")
        while True:
            try:
                state = self._record(problem)
                break
            except StoreError as error:
                if not error.outage:
                    self._say(f"run {taken.run}: {error}")
                    return MACHINE
                time.sleep(OUTAGE_SECONDS)  # this worker has the run, until another one takes it
        self._say(f"run {taken.run} is {state}")
        if problem is None or problem.status is None:
            return None
        if problem.status < 0:  # the system killed it
            return MACHINE
        return problem.status if problem.status in (OUTAGE, MACHINE) else None

    def _run_child(self) -> Failure | None:
        taken, limits = self._taken, self._limits
        patience = Patience(limits.silent_seconds, STOPPING_SECONDS)
        with tempfile.TemporaryDirectory(prefix="turret-") as folder:
            alone = Path(folder) / "training"
            alone.mkdir()
            request = {
                "taken": taken.as_json(),
                "local": str(self._store.root.absolute()),
                "folder": str(alone),
                "silent": limits.silent_seconds,
                "stopping": STOPPING_SECONDS,
                "bases": list(limits.bases),
            }
            with LeaseRenewer(self._store.database(), taken.lease, turn=self._turn, warn=self._say) as keeper:
                errors = Path(folder) / "stderr.txt"
                stop = lambda: self._asked.is_set() or keeper.lost or self._took_too_long()
                where = self._store.location
                problem = run_child(CHILD, json.dumps(request), errors, self._tell, where, stop, patience)
                if problem is not None and (problem.status is None or problem.status < 0):
                    self._tell(problem.text)  # its process was killed, and could not say it
                return problem

    def _tell(self, line: str) -> None:
        self._say(f"run {self._taken.run}: {line}")
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
        if self._end is None or time.monotonic() < self._end or self._over.is_set():
            return self._over.is_set()
        hours = (self._limits.most_seconds or 0) / 3600
        line = f"it took more than {hours:g} hours, the limit of its worker (--most-hours): train for fewer steps"
        try:
            self._queue.after(self._taken, line, again=False)
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
            state = self._queue.after(taken, text, outage=outage)
        except LeaseLost:
            return "taken over by another worker, or ended"
        return state or str(self._store.with_access(Access(taken.tenant)).run(taken.run)["state"])
