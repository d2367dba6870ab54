"""Workers that do every operation of the queue, of leases, of kept files and of gc, to be killed at any moment.

    fleet_worker.py WHERE FOLDER SECONDS SEED WORKERS

Forks workers, which write a line to FOLDER/said after each operation that was acknowledged, kills one again and again,
and forks another. The last line of stdout is the number of kills. A worker that is killed after an operation and before
its line has done more than it said.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

from turret.errors import InUse, LeaseLost, NotFound, QueueFull, StoreError
from turret.store import JobQueue, Store, leases, queued_data
from turret.store.jobs import Job

NAMES = ("sentiment", "topics")
DATA = {f"{number:032x}": f"text,label\n{number},good\n" for number in range(3)}  # place -> content of a table


class Worker:
    """One process. A line is JSON: what was acknowledged."""

    def __init__(self, where: str, folder: Path, seed: int) -> None:
        self.store, self.folder, self.draw = Store(where), folder, random.Random(seed)
        self.queue = JobQueue.of(self.store, make=True)
        self._said = os.open(folder / "said", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def say(self, what: str, **more: object) -> None:
        os.write(self._said, (json.dumps({"what": what, **more}) + "\n").encode())

    def turn(self) -> None:
        """One operation of a client, or one try of a training."""
        try:
            act = self.draw.choice((self.submit, self.train, self.train, self.cancel, self.compare, self.collect))
            act()
        except (InUse, NotFound, LeaseLost, QueueFull):
            pass  # another worker was earlier
        except StoreError as error:
            self.say("error", text=str(error))

    def submit(self) -> None:
        place = self.draw.choice(list(DATA))
        table = self.folder / f"{os.getpid()}.csv"
        table.write_text(DATA[place])
        recipe, data = f"source = '{place}/a.csv'\n", {f"{place}/a.csv": table}
        store, priority = self.store, self.draw.randrange(3)
        keep = partial(queued_data.submit, store.root, store.database(), store.artifacts, data)
        run = self.queue.submit(self.draw.choice(NAMES), recipe, priority=priority, place=keep)
        self.say("submitted", run=run)

    def collect(self) -> None:
        removed = self.store.gc().removed
        self.say("collected", data=sum(each.why == queued_data.WHY for each in removed))

    def require_data(self, taken: Job) -> None:
        """What a running training needs is there, whatever was removed."""
        (place,) = queued_data.PLACE.findall(taken.recipe)
        self.store.artifacts.bring(f"{queued_data.FOLDER}/{place}/")
        table = self.store.root / queued_data.FOLDER / place / "a.csv"
        if not table.exists() or table.read_text() != DATA[place]:
            self.say("error", text=f"the data of {taken.id} is gone")

    def cancel(self) -> None:
        waiting = [each for each in self.store.runs(50) if each["state"] in ("waiting", "running") and each["queue"]]
        if waiting:
            run = self.draw.choice(waiting)["id"]
            self.say("cancelling", run=run)
            self.say("cancelled", run=run, state=self.queue.cancel(run))

    def train(self) -> None:
        """A training of a few steps, each with a checkpoint; it may be returned, fail, or be resumed."""
        if (taken := self.queue.take()) is None:
            return
        held = self.queue.adopt_training(taken)
        self.require_data(taken)
        step = int(held.curve.read_text() or 0) if held.curve.exists() else 0
        self.say("taken", run=taken.id, fence=taken.lease.fence, step=step)
        with self.store.training_runs().keeper(held, lambda line: None) as keeper:
            for _ in range(3):
                step += 1
                beside = held.folder / "curve.new"
                beside.write_text(str(step))
                os.replace(beside, held.curve)
                self.store.artifacts.keep([held.curve], taken.lease)
                self.say("kept", run=taken.id, step=step, fence=taken.lease.fence)
                keeper.require()
            if self.queue.write_log(taken, [f"step {step}"]):
                self.say("ended", run=taken.id, state=self.queue.end_try(taken, None))
                return
            self.say("logged", run=taken.id, line=f"step {step}")
        if step >= 3 and self.draw.random() < 0.8:
            result = {"step": step, "fence": taken.lease.fence}
            self.store.end_run(held, "finished", result=result)
            self.say("finished", run=taken.id, result=result)
        else:
            self.say("ended", run=taken.id, state=self.queue.end_try(taken, self.draw.choice((None, "an outage"))))

    def compare(self) -> None:
        """One cell of a comparison that all workers want to conduct."""
        database, name = self.store.database(), "comparisons/one"
        with database.writing() as connection:
            lease = leases.take(connection, name)
        if lease is None:
            return
        self.store.artifacts.bring(f"{name}/")
        path = self.store.root / name / f"{os.getpid()}" / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"fence": lease.fence}))
        self.store.artifacts.keep([path], lease)
        self.say("cell", path=path.relative_to(self.store.root).as_posix(), fence=lease.fence)
        with database.writing() as connection:
            leases.release(connection, lease)


def work(where: str, folder: Path, seed: int) -> None:
    worker = Worker(where, folder, seed)
    worker.say("started", process=os.getpid())
    while True:
        worker.turn()


def main(where: str, folder: Path, seconds: float, seed: int, count: int) -> None:
    draw, kills, processes = random.Random(seed), 0, list[int]()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        while len(processes) < count:
            if (process := os.fork()) == 0:
                try:
                    work(where, folder, draw.randrange(1 << 30) + kills)
                finally:
                    os._exit(1)
            processes.append(process)
        time.sleep(draw.uniform(0.1, 0.9))
        process = processes.pop(draw.randrange(count))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills += 1
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    print(kills + len(processes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
