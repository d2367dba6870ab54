"""Real workers on one PostgreSQL and S3, stopped past their lease, killed and cancelled in every phase of a training.

TURRET_QUEUE_STORM_SECONDS says for how long the storm lasts; 300 by default. It takes up to eight times as long on a
machine that is so busy that not every deed was done in some phase. The queue then drains.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import select
from workspace.test_comparing import recipe_in

from turret.database import jobs
from turret.errors import InUse, StoreError
from turret.ops.cpu import compiled as kernels
from turret.store import JobQueue, leases
from turret.store.jobs import TRIES
from turret.store.runs import ENDED
from turret.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.fleet]
SECONDS = float(os.environ.get("TURRET_QUEUE_STORM_SECONDS", "300"))
LEASE = 3.0
PHASES = ("reading", "loading", "checking the plan", "step", "proving", "storing")  # as a training says them
DEEDS = ("stop", "stop and cancel", "stop and fail", "stop the child", "kill", "kill both", "cancel", "end")
DRAIN_SECONDS = 400.0


class Worker:
    """A worker process, started again when it has ended. It knows the newest phase of its training."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self.run, self.phase, self.errors = "", "", list[str]()
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "turret",
            "worker",
            "--slots",
            "2",
            "--silent-minutes",
            "3",
            "--store",
            self.url,
        ]
        self.works = False
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/")
        threading.Thread(target=self._listen, args=[self.process], daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.errors.append(line.rstrip())
                words = line.split()
                self.works = self.works or line.startswith("working for")
                if words[:1] == ["run"] and len(words) > 2:
                    self.run = words[1].rstrip(":,")
                    text = line.partition(f"{self.run}: ")[2]
                    self.phase = next((each for each in PHASES if text.startswith(each)), self.phase)
                    if words[2] in ("is", "try"):
                        self.phase = ""

    def signal(self, number: int, *, child: bool = True, parent: bool = True) -> None:
        for each in [*(descendants(self.process.pid) if child else ()), *([self.process.pid] if parent else ())]:
            send(each, number)

    def wait_for_phase(self, phase: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if self.phase == phase:
                return True
            time.sleep(0.005)
        return False


def descendants(parent: int) -> list[int]:
    """The living processes that a process has started, and those that they have started."""
    try:
        names = [*Path(f"/proc/{parent}/task").iterdir()]
        found = [int(each) for name in names for each in (name / "children").read_text().split()]
    except OSError:
        return []
    return [*found, *(each for child in found for each in descendants(child))]


@pytest.fixture
def workers(new_url: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Worker]]:
    monkeypatch.setenv(leases.VARIABLE, str(LEASE))
    kernels.library()
    url = new_url()
    started = [Worker(url.replace(str(tmp_path / "local"), str(tmp_path / name)), name) for name in ("one", "two")]
    yield started
    for each in started:
        each.signal(signal.SIGCONT)
        each.signal(signal.SIGKILL)
        each.process.wait()


class Watch(threading.Thread):
    """Sees every state of every run, and that none changes after its end."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(daemon=True)
        self.workspace, self.ended, self.wrong, self.over = (
            workspace,
            dict[str, tuple[str, str]](),
            "",
            threading.Event(),
        )

    def run(self) -> None:
        while not self.over.wait(0.1):
            with suppress(StoreError):  # at the end of a test that has failed
                self.look()

    def look(self) -> None:
        with self.workspace.store.database().reading() as connection:
            rows = connection.execute(select(jobs.c.id, jobs.c.state, jobs.c.result, jobs.c.error)).all()
            versions = Counter(str(each.run) for each in self.workspace.list())
        for row in rows:
            found = (str(row.state), str(row.result))
            if row.id in self.ended and self.ended[row.id] != found:
                self.wrong = self.wrong or f"{row.id} was {self.ended[row.id]} and is {found}"
            if row.state in ENDED:
                self.ended[row.id] = found
                if versions[row.id] > 1 or (row.state != "finished" and versions[row.id]):
                    self.wrong = self.wrong or f"{row.id} is {row.state} with {versions[row.id]} versions"


def test_stopped_killed_and_cancelled_in_every_phase_a_run_ends_once(workers, tmp_path) -> None:
    draw = random.Random(35)
    workspace = Workspace(workers[0].url.replace("/one", "/desk"))
    recipe = recipe_in(tmp_path, **{"train.epochs": "3", "train.checkpoint_every": "1", "train.max_steps": "none"})
    watch, submitted, done = Watch(workspace), 1, Counter[tuple[str, str]]()
    asleep: list[tuple[float, Worker, list[int]]] = []  # (wakes, worker, its processes)
    # The first of them have every deed and every phase, and all of them each pair.
    plan = [(PHASES[(n + n // 24) % 6], DEEDS[n % 8]) for n in range(len(DEEDS) * len(PHASES))][::-1]
    workspace.queue.submit(recipe.with_overrides({"seed": "0"}))
    watch.start()
    begun = time.monotonic()

    def over() -> bool:
        passed = time.monotonic() - begun
        return not plan or passed > 8 * SECONDS or (passed > SECONDS and len(done) >= len(DEEDS))

    while not over() or asleep:
        assert watch.wrong == ""
        waiting = sum(each["state"] == "waiting" for each in workspace.runs())
        for _ in range(max(0, 3 - waiting)):
            submitted += 1
            workspace.queue.submit(recipe.with_overrides({"seed": str(submitted)}))
        for each in [each for each in asleep if each[0] < time.monotonic()]:
            asleep.remove(each)
            for process in each[2]:
                send(process, signal.SIGCONT)
        free = [each for each in workers if each not in [one for _, one, _ in asleep]]
        for each in free:
            if each.process.poll() is not None:
                each.start()
        if not free or over():
            time.sleep(0.2)
            continue
        worker, (phase, deed) = draw.choice(free), plan[-1]
        if not worker.wait_for_phase(phase, 40):
            plan.insert(0, plan.pop())  # a base that stays in memory is not loaded again before its process ends
            continue
        plan.pop()
        time.sleep(draw.choice((0.0, 0.0, 0.02, 0.2)))
        run = worker.run
        done[deed, phase] += 1
        if deed == "kill":
            worker.signal(signal.SIGKILL, child=False)
        elif deed == "kill both":
            worker.signal(signal.SIGKILL)
        elif deed == "end":
            worker.signal(signal.SIGTERM, child=False)
        elif deed == "cancel":
            cancel(workspace, run)
        else:
            processes = descendants(worker.process.pid)
            processes += [] if deed == "stop the child" else [worker.process.pid]
            for process in processes:
                send(process, signal.SIGSTOP)
            asleep.append((time.monotonic() + draw.uniform(1.5, 3) * LEASE, worker, processes))
            if deed == "stop and cancel":
                threading.Timer(1.2 * LEASE, cancel, (workspace, run)).start()
            elif deed == "stop and fail":
                threading.Timer(1.2 * LEASE, use_up_tries, (workspace, run)).start()
    end = time.monotonic() + DRAIN_SECONDS
    while {str(each["state"]) for each in workspace.runs()} - set(ENDED):
        for each in workers:
            if each.process.poll() is not None:
                each.start()
        assert watch.wrong == ""
        assert time.monotonic() < end, [(each["id"], each["state"]) for each in workspace.runs()]
        time.sleep(0.5)
    end = time.monotonic() + 120  # a process of a training needs some time to end on a busy machine
    started = [each for worker in workers for each in descendants(worker.process.pid)]  # the kept ones
    for worker in workers:
        while not worker.works and worker.process.poll() is None:  # one that has just been started
            assert time.monotonic() < end, "a worker did not start"
            time.sleep(0.05)
        worker.process.terminate()
        assert worker.process.wait(60) == 0, worker.errors[-10:]
    while left := [each for each in started if is_alive(each)]:
        assert time.monotonic() < end, f"{left} are left running"
        time.sleep(0.2)
    watch.over.set()
    watch.join()
    watch.look()
    assert watch.wrong == ""
    check(workspace, submitted)
    print(f"{sum(done.values())} deeds in {time.monotonic() - begun:.0f} s: {dict(done)}")
    assert {deed for deed, _ in done} >= set(DEEDS)
    assert {phase for _, phase in done} >= set(PHASES)


def check(workspace: Workspace, submitted: int) -> None:
    """Every run has ended; a finished one has one version, the others have none; nothing is published twice."""
    found = workspace.runs()
    assert len(found) == submitted
    versions = defaultdict(list)
    for version in workspace.list():
        versions[str(version.run)].append(str(version))
    for run in found:
        if run["state"] == "finished":
            assert versions[run["id"]] == [run["result"]["version"]], run
        else:
            assert run["state"] in ("failed", "cancelled"), run
            assert versions[run["id"]] == [], run
            assert run["error"]
        assert run["queue"]["tries"] <= TRIES
    states = Counter(str(run["state"]) for run in found)
    print(f"{submitted} trainings: {dict(states)}")
    assert states["finished"] > 0
    assert states["cancelled"] > 0
    assert workspace.store.verify().problems == ()
    with workspace.store.database().reading() as connection:
        assert leases.held_leases(connection, "jobs/") == set()


def cancel(workspace: Workspace, run: str) -> None:
    with suppress(InUse):  # it has ended
        workspace.queue.cancel(run)


def use_up_tries(workspace: Workspace, run: str) -> None:
    """As a third worker of the fleet that takes the run, and dies, until it fails."""
    queue = JobQueue.of(workspace.store)
    for _ in range(2 * TRIES):
        taken = queue.take()
        if taken is not None:
            queue.end_try(taken, "another machine failed", again=taken.id != run)
            if taken.id == run:
                return
        time.sleep(0.2)


def send(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
