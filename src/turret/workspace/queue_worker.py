"""A worker: takes trainings from the queue, one after another, and runs each in a process of its own.

The worker holds the lease of a run and writes its log. `turret.workspace.queued_training` is the process that trains.
It ends, with a checkpoint, when the worker ends.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path

from turret.access import Access
from turret.errors import BadLocation, Interrupted, LeaseLost, StoreError
from turret.process import stop_on_sigterm
from turret.store import Store, TrainingQueue
from turret.store.leases import Keeper
from turret.store.queue import QueuedRun
from turret.workspace.child_process import run_child
from turret.workspace.progress import Say

CHILD = "turret.workspace.queued_training"
POLL_SECONDS = 1.0  # between two looks at an empty queue
OUTAGE_SECONDS = 5.0  # after the store did not answer


def work(store: Store, say: Say, *, until_empty: bool) -> int:
    """Take and run trainings until a signal, or until nothing is due. Returns how many were taken."""
    stop_on_sigterm()
    queue, count, lost = TrainingQueue.of(store, make=True), 0, False
    try:
        while True:
            try:
                taken, lost = queue.take(), False
            except BadLocation:
                raise
            except StoreError as error:
                if not lost:
                    say(f"{error}; trying again")
                lost = True
                time.sleep(OUTAGE_SECONDS)
                continue
            if taken is None:
                if until_empty:
                    return count
                time.sleep(POLL_SECONDS)
                continue
            count += 1
            say(f"run {taken.run}, try {taken.tries}")
            try:
                say(f"run {taken.run} is {_carried_out(store, queue, taken, say)}")
            except StoreError as error:  # its lease was lost, or ends by itself
                say(f"run {taken.run}: {error}")
    except (KeyboardInterrupt, Interrupted):
        say("stopped")
        return count


def _carried_out(store: Store, queue: TrainingQueue, taken: QueuedRun, say: Say) -> str:
    """Run one training. Returns its state."""
    lines: list[str] = []
    lock, asked = threading.Lock(), threading.Event()

    def tell(line: str) -> None:
        say(f"run {taken.run}: {line}")
        with lock:
            lines.append(line)

    def turn(over: bool) -> None:
        """Write the new lines to the log, and see whether the end of the run was asked for."""
        with lock:
            new, lines[:] = list(lines), []
        try:
            if queue.write_log(taken, new, last=over):
                asked.set()
        except BaseException:
            with lock:
                lines[:0] = new
            raise

    request = {"taken": taken.as_json(), "local": str(store.root.absolute())}
    with tempfile.TemporaryDirectory(prefix="turret-") as folder:
        problem: str | None = "the worker failed"
        try:
            with Keeper(store.database(), taken.lease, turn=turn, warn=say) as keeper:
                errors = Path(folder) / "stderr.txt"
                stop = lambda: asked.is_set() or keeper.lost
                problem = run_child(CHILD, json.dumps(request), errors, tell, store.location, stop)
        except (KeyboardInterrupt, Interrupted):
            problem = None
            raise
        finally:
            state = _after(queue, taken, problem)
    return state or str(store.seen_by(Access(taken.tenant)).run(taken.run)["state"])


def _after(queue: TrainingQueue, taken: QueuedRun, problem: str | None) -> str | None:
    """Record a try that ended without a word of its process, which otherwise records its end itself."""
    try:
        return queue.after(taken, problem)
    except LeaseLost:
        return "taken over by another worker"
