"""Workers on one store by URL are killed, PostgreSQL crashes, S3 hangs: nothing that was acknowledged is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import PASSWORD, PostgresServer, postgres
from sqlalchemy import update
from store.fleet_worker import Worker
from store.s3_proxy import DEEDS, proxied, through

from turret.database import jobs
from turret.errors import StoreError, TurretError
from turret.store import JobQueue, Store, leases
from turret.store.jobs import TRIES

pytestmark = [pytest.mark.slow, pytest.mark.fleet]
WORKER = Path(__file__).with_name("fleet_worker.py")
ENDED = ("finished", "failed", "cancelled")


def said(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "said").read_text().splitlines()]


def forget_processes(store: Store) -> None:
    """As if the workers had been on other machines, whose leases have ended by now."""
    with store.database().writing() as connection:
        ended = update(leases.leases).where(leases.leases.c.until > 0)
        connection.execute(ended.values(process="other-boot/1/1/1", until=1.0))


def check(store: Store, lines: list[dict[str, Any]]) -> None:
    """Everything that was acknowledged is there, once, and nothing of a replaced worker."""
    by_what = defaultdict(list)
    for line in lines:
        by_what[line["what"]].append(line)
    runs = {str(each["id"]): each for each in store.runs(100_000)}
    assert {line["run"] for line in by_what["submitted"]} <= runs.keys()
    assert {each["state"] for each in runs.values()} <= {"waiting", *ENDED}, "none stays running"
    assert all(each["queue"]["tries"] <= TRIES for each in runs.values())
    finished = [line["run"] for line in by_what["finished"]]
    assert len(finished) == len(set(finished)), "finished twice"
    for line in by_what["finished"]:
        assert (runs[line["run"]]["state"], runs[line["run"]]["result"]) == ("finished", line["result"])
    for line in by_what["cancelled"]:
        assert line["state"] == "running" or runs[line["run"]]["state"] == "cancelled"
    steps: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for line in by_what["kept"]:
        steps[line["run"]].append((line["fence"], line["step"]))
    for run, kept in steps.items():
        content = store.artifacts.read(f"runs/{run}/curve.jsonl")
        assert content is not None
        assert int(content) >= max(step for _, step in kept), "a step went back"
        by_fence = sorted(kept)
        assert [step for _, step in by_fence] == sorted(step for _, step in kept), "an earlier owner wrote later"
    for run in {line["run"] for line in by_what["logged"]}:
        written = [line["line"] for line in by_what["logged"] if line["run"] == run]
        log = [each["line"] for each in JobQueue.of(store).log(run)]
        assert set(written) <= set(log)
    cells = {each.path for each in store.artifacts.list_files("comparisons/")}
    assert {line["path"] for line in by_what["cell"]} <= cells
    fences = [line["fence"] for line in by_what["cell"]]
    assert len(fences) == len(set(fences)), "two conducted the comparison at once"
    store.gc()
    found = store.verify()
    assert found.problems == ()
    assert found.orphans == 0 or killed_puts(store) >= found.orphans


def killed_puts(store: Store) -> int:
    """Copies whose put was killed within the last hour: a gc leaves them."""
    from turret.database import uploads

    with store.database().reading() as connection:
        return len(connection.execute(uploads.select()).all())


def drain(store: Store, folder: Path) -> None:
    """What still waits can be trained: the queue is not stuck."""
    worker = Worker(str(store.location.given), folder, 7)
    for _ in range(2000):
        with store.database().writing() as connection:
            connection.execute(update(jobs).values(due=0.0))
        if not [each for each in store.runs(100_000) if each["state"] == "waiting"]:
            return
        with suppress(TurretError):
            worker.train()
    raise AssertionError("something waits for ever")


@pytest.mark.parametrize(("files", "seconds", "least"), [("folder", 100, 80), ("s3", 80, 40)])
def test_killed_at_random_moments_in_all_operations_of_the_fleet(new_url, tmp_path, files, seconds, least) -> None:
    url = new_url() if files == "s3" else new_url(str(tmp_path / "files"))
    Store(url).database(make=True)
    command = [sys.executable, str(WORKER), url, str(tmp_path), str(seconds), "1", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, check=False)
    assert done.returncode == 0, done.stderr
    lines = said(tmp_path)
    assert int(done.stdout.split()[-1]) >= least
    assert {"submitted", "taken", "kept", "logged", "finished", "cancelled", "cell"} <= {line["what"] for line in lines}
    assert [line for line in lines if line["what"] == "error"] == []
    assert sum(line["data"] for line in lines if line["what"] == "collected") > 0
    store = Store(url)
    forget_processes(store)
    check(store, lines)
    drain(store, tmp_path)
    check(store, said(tmp_path))


def test_postgresql_crashes_within_transactions(s3_server, tmp_path) -> None:
    """The server kills all connections and recovers; every operation ends in one line, in time, without a password."""
    with postgres() as server, server.database() as name:
        url = f"{server.url_with_password(name)}?files={tmp_path / 'files'}&local={tmp_path / 'local'}"
        Store(url).database(make=True)
        slowest, stop, threads = [0.0], threading.Event(), []
        failures: list[BaseException] = []

        def work(number: int) -> None:
            worker = None
            while not stop.is_set():
                began = time.monotonic()
                try:
                    worker = worker or Worker(url, tmp_path, number)
                    worker.turn()
                except StoreError as error:
                    failures.extend([AssertionError(str(error))] if "\n" in str(error) else [])
                except BaseException as error:
                    failures.append(error)
                    return
                slowest[0] = max(slowest[0], time.monotonic() - began)

        threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        crashes = crash_again_and_again(server, random.Random(3), 60)
        stop.set()
        for thread in threads:
            thread.join(timeout=120)
        assert crashes >= 8
        assert failures == []
        assert slowest[0] < 60, "all transactions of one operation, with the wait for other writers"
        lines = said(tmp_path)
        errors = [line["text"] for line in lines if line["what"] == "error"]
        assert errors, "the crashes were felt"
        assert not [text for text in errors if "\n" in text or PASSWORD in text or "not%3A" in text]
        store = Store(url)
        forget_processes(store)
        check(store, lines)
        drain(store, tmp_path)


def crash_again_and_again(server: PostgresServer, draw: random.Random, seconds: float) -> int:
    """Kill a process of the server, which then ends all others and recovers."""
    end, crashes = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        time.sleep(draw.uniform(1, 4))
        with suppress(Exception):  # it recovers
            rows = server.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'turret'")
            if rows:
                os.kill(int(str(draw.choice(rows)[0])), signal.SIGKILL)
                crashes += 1
    for _ in range(200):
        with suppress(Exception):
            server.execute("SELECT 1")
            return crashes
        time.sleep(0.1)
    raise AssertionError("PostgreSQL did not recover")


@pytest.mark.parametrize("deed", DEEDS)
def test_whatever_happens_to_any_request_of_a_kept_file_its_content_is_a_whole_one(
    new_url, s3_server, tmp_path, deed
) -> None:
    """Every request of `keep` and `bring` in turn. What was acknowledged is the content, or a later one."""
    url = new_url()
    with proxied(s3_server) as (proxy, address):
        ours, other = through(address, url), Store(url)
        path = ours.root / "runs" / "one" / "curve.jsonl"
        path.parent.mkdir(parents=True)
        acknowledged, number, reached = 0, 0, True
        ours.artifacts.keep([path], None)
        while reached:
            path.write_text(str(number + 1))
            proxy.rule(deed, skip=number % 12)
            done: list[str] = []
            thread = threading.Thread(target=act, args=[ours, path, done])
            thread.start()
            while thread.is_alive() and not proxy.caught.is_set():
                thread.join(0.01)
            reached = proxy.caught.is_set() and number < 12
            if deed != "hold":
                thread.join(timeout=120)
            proxy.release()
            thread.join(timeout=120)
            assert not thread.is_alive()
            assert all("\n" not in line for line in done)
            if "kept" in done:
                acknowledged = number + 1
            content = other.artifacts.read("runs/one/curve.jsonl")
            assert int(content or 0) >= acknowledged
            assert other.verify().problems == ()
            number += 1
        assert number >= 2
        other.gc()
        assert other.verify().orphans <= killed_puts(other)


def act(store: Store, path: Path, done: list[str]) -> None:
    try:
        store.artifacts.keep([path])
        done.append("kept")
        path.unlink()
        store.artifacts.bring("runs/one/")
    except StoreError as error:
        done.append(str(error))


def test_a_silent_s3_delays_neither_the_lease_nor_another_writer(new_url, s3_server, tmp_path, monkeypatch) -> None:
    """A checkpoint cannot be copied for longer than a lease lasts; the training keeps its lease, and is warned once."""
    monkeypatch.setenv(leases.VARIABLE, "2")
    url, warnings = new_url(), list[str]()
    with proxied(s3_server) as (proxy, address):
        ours, other = through(address, url), Store(url)
        run = ours.new_run("a", "x", "y")
        proxy.rule("silent", times=1000)
        began = time.monotonic()
        run.curve.write_text("1\n")
        run.checkpoint.mkdir()
        (run.checkpoint / "checkpoint.safetensors").write_bytes(b"1")

        def train() -> None:
            with ours.training_runs().keeper(run, warnings.append) as keeper:
                while time.monotonic() - began < 6:
                    keeper.require()
                    JobQueue.of(other).submit("b", "x")
                    time.sleep(0.2)

        with pytest.raises(StoreError, match="does not answer"):
            train()
        assert time.monotonic() - began < 120
        proxy.release()
        with other.database().writing() as connection:
            run.lease.require(connection)
        assert not [line for line in warnings if "\n" in line]
        ours.end_run(run, "interrupted", error="S3 was silent")


def test_a_worker_that_was_stopped_and_wakes_up_writes_nothing(new_url, tmp_path) -> None:
    """SIGSTOP for longer than its lease, and SIGCONT once another worker has its training.

    It stops itself, between two transactions: PostgreSQL ends one that waits too long, with an error of its own.
    """
    url = new_url(str(tmp_path / "files"))
    store = Store(url)
    queue = JobQueue.of(store, make=True)
    run = queue.submit("a", "x")
    code = (
        "import os, signal, sys; from turret.store import Store, JobQueue\n"
        "store = Store(sys.argv[1]); queue = JobQueue.of(store); taken = queue.take()\n"
        "held = queue.adopt_training(taken)\n"
        "print('taken', flush=True)\n"
        "for number in range(10_000):\n"
        "    queue.write_log(taken, [f'slow {number}'])\n"
        "    number != 3 or os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    variables = {**os.environ, leases.VARIABLE: "1"}
    slow = subprocess.Popen(
        [sys.executable, "-c", code, url], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert slow.stdout is not None
    assert slow.stdout.readline() == "taken\n"
    until(lambda: psutil.Process(slow.pid).status() == psutil.STATUS_STOPPED)
    assert len(queue.log(run)) == 4
    until(lambda: store.database().writable() and can_take(queue, taken_over))
    (quick,) = taken_over
    before = len(queue.log(run))
    slow.send_signal(signal.SIGCONT)
    _, err = slow.communicate(timeout=60)
    assert slow.returncode == 1
    assert f"LeaseLost: jobs/{run} was taken over" in err
    assert len(queue.log(run)) == before
    with store.database().writing() as connection:
        quick.lease.require(connection)
    taken_over.clear()


taken_over: list[Any] = []


def can_take(queue: JobQueue, found: list[Any]) -> bool:
    if (taken := queue.take()) is not None:
        found.append(taken)
    return bool(found)


def until(check: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
