"""The kept process in which jobs share bases: `python -P -m turret.workspace.resident_trainer REQUEST`.

It hears and says the lines of `turret.workspace.child_process`. Each job has a thread; one more thread computes for all
of them. When stdin is closed, each job writes a checkpoint and returns to the queue.

It opens no file of a tenant: `turret.workspace.data_readers` reads the data, in a process that is killed if it hangs.
Only the cells of a comparison that its parent runs read their own data, from the same folder as the parent.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import FrameType

from turret import process
from turret.access import Access
from turret.data import Dataset
from turret.errors import one_line
from turret.recipe import Recipe
from turret.store.jobs import Job
from turret.train.curve import StepRecord
from turret.workspace.child_process import (
    ALIVE_SECONDS,
    Ended,
    StartLine,
    StopLine,
    WorkerRequest,
    hear_parent,
    mistake_of_turret,
    parents_store,
    print_to_parent,
    say_to_parent,
)
from turret.workspace.data_readers import DataReaders
from turret.workspace.job_process import WATCHED, Trial, callbacks_for, carry_out
from turret.workspace.reading import read_dataset
from turret.workspace.resident import ResidentBases, Room, Seat


class Trainer:
    """The runs of this process.

    Args:
        asked: the request of the worker. The readers of data write into its folder.
    """

    def __init__(self, asked: WorkerRequest) -> None:
        self._asked = asked
        self._store = parents_store(asked["local"])
        folder = None if asked["folder"] is None else Path(asked["folder"])
        self._readers = DataReaders(self._store, asked["silent"], folder=folder)
        self._bases, self._room = ResidentBases(), Room()
        self._queued: Collection[str] = ()  # names of the bases that waiting runs want
        self._runs: dict[str, _Run] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    def hear(self, asked: StartLine | StopLine) -> None:
        """Carry out a line of the worker."""
        if "stop" in asked:
            with self._changed:
                run = self._runs.get(str(asked["stop"]))
            if run is not None:
                run.stop.set()
            return
        taken = Job.of(asked["start"])
        self._queued = asked["queued"]
        run = _Run(taken, self._stopping)
        run.seat = Seat(self._bases, self._room, self._wanted_bases, run.asked)
        with self._changed:
            self._runs[taken.id] = run
        threading.Thread(target=self._carry_out, args=[run], name=f"turret {taken.id}", daemon=True).start()

    def stop(self, *_: int | FrameType | None) -> None:
        """Ask all runs to end."""
        self._stopping.set()

    def wait(self) -> None:
        """Give signs of life until all runs have ended after `stop`."""
        while True:
            with self._changed:
                runs = list(self._runs.values())
                if self._stopping.is_set() and not runs:
                    return
                self._changed.wait(ALIVE_SECONDS / 4)
            # A thread in C, which does not need Python's lock: a regular expression may hold that for ever.
            faulthandler.dump_traceback_later(WATCHED * self._asked["silent"] + self._asked["stopping"], exit=True)
            for each in runs:
                if each.waits:
                    each.sign()

    def _carry_out(self, run: _Run) -> None:
        taken = run.taken
        store = self._store.with_access(Access(taken.tenant))
        try:
            with self._room.taken_by(run.seat):
                callbacks = callbacks_for(run.say, run.heard)

                def read(recipe: Recipe) -> Dataset:
                    run.seat.base = recipe.base
                    if self._asked["folder"] is None:
                        return read_dataset(store, recipe, callbacks.stage)
                    callbacks.stage(f"reading {one_line(recipe.data.source, 100)}")
                    run.reads = True
                    try:
                        return self._readers.read(replace(taken, recipe=recipe.to_toml()), run.asked)
                    finally:
                        run.reads = False

                trial = Trial(callbacks, read, run.seat, run.asked)
                ended = carry_out(store, taken, self._asked["bases"], trial)
        except BaseException as error:  # a mistake of Turret ends one run
            ended = Ended(1, mistake_of_turret(error))
        with self._changed:
            del self._runs[taken.id]
            self._changed.notify_all()
        print_to_parent({"run": taken.id, "status": ended.status, "text": ended.text})
        process.release_memory()

    def _wanted_bases(self) -> Collection[str]:
        with self._changed:
            return {*self._queued, *(each.seat.base for each in self._runs.values())}


class _Run:
    """A run in this process."""

    def __init__(self, taken: Job, stopping: threading.Event) -> None:
        self.taken, self.stop, self._stopping = taken, threading.Event(), stopping
        self.reads = False  # another process reads its data, for a limited time
        self.seat: Seat
        self._trains = False  # it has made a step here
        self._signed = 0.0

    @property
    def waits(self) -> bool:
        """Whether others must do something before it goes on."""
        return self.reads or self.seat.waits

    def asked(self) -> bool:
        """Whether it shall end."""
        return self.stop.is_set() or self._stopping.is_set()

    def say(self, line: str) -> None:
        """Say a line for its log."""
        say_to_parent(self.taken.id, line)

    def heard(self, record: StepRecord | None) -> None:
        """It has begun a stage, which raises Interrupted if it shall end, or has made a step."""
        if record is None:
            self.seat.require_wanted()
        else:
            self.seat.settle()
            if not self._trains:
                self._trains = True
                process.release_memory()  # what its data and the start of its head needed
        self.sign()

    def sign(self) -> None:
        """Give a sign of life, but not too often."""
        now = time.monotonic()
        if now - self._signed > ALIVE_SECONDS:
            self._signed = now
            print_to_parent({"run": self.taken.id})


def main(request: str) -> None:
    """Train what the worker gives, until it ends."""
    process.use_one_heap()  # one heap for the threads of all runs: what one frees, another uses
    process.exempt_loaded()  # a collection for each run then looks at runs and bases alone
    asked: WorkerRequest = json.loads(request)
    if asked["folder"] is not None:
        os.chdir(asked["folder"])
    trainer = Trainer(asked)
    signal.signal(signal.SIGTERM, trainer.stop)
    hear_parent(trainer.hear, trainer.stop, asked["stopping"])
    trainer.wait()


if __name__ == "__main__":
    main(sys.argv[1])
