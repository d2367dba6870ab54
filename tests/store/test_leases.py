"""One process at a time does a piece of work; a dead one is replaced, and a slow one cannot write afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from turret.database import Database, jobs
from turret.errors import LeaseLost, StoreError
from turret.store import Store, leases
from turret.store.leases import Lease, LeaseRenewer

ANOTHER_MACHINE = "other-boot/4026531836/1/1"
HOLD = """
import sys, time
from turret.store import Store, leases
database = Store(sys.argv[1]).database(make=True)
with database.writing() as connection:
    assert leases.take(connection, "work") is not None
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def database(store: Store) -> Database:
    return store.database(make=True)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(leases.VARIABLE, "0.6")


def take(database: Database, name: str = "work") -> Lease | None:
    with database.writing() as connection:
        return leases.take(connection, name)


def elsewhere(database: Database, until: float = 0.6) -> None:
    """The process that holds the lease is now one of another machine, whose clock does not matter."""
    with database.writing() as connection:
        values = {"process": ANOTHER_MACHINE, "host": "far", "until": leases.clock(connection) + until}
        connection.execute(update(leases.leases).values(values))


def test_a_lease_is_taken_once_and_again_after_its_release_with_a_higher_fence(database) -> None:
    first = take(database)
    assert first is not None
    assert take(database) is None
    with database.writing() as connection:
        leases.release(connection, first)
    second = take(database)
    assert second is not None
    assert (first.fence, second.fence) == (1, 2)


def test_a_slow_owner_whose_lease_was_taken_writes_nothing_any_more(database, short) -> None:
    slow = take(database)
    assert slow is not None
    elsewhere(database, until=-1)
    quick = take(database)
    assert quick is not None
    for act in (slow.require, lambda connection: leases.renew(connection, slow)):
        with pytest.raises(LeaseLost, match="work was taken over by a process on"), database.writing() as connection:
            act(connection)
    with database.writing() as connection:
        leases.release(connection, slow)  # not ours any more
        quick.require(connection)
    assert take(database) is None


def test_an_owner_moves_its_own_lease_alone_and_a_released_one_is_nobodys(database) -> None:
    held = {name: take(database, name) for name in ("a", "b", "c")}
    lease = held["b"]
    assert lease is not None

    def rows() -> dict[str, tuple[float, str]]:
        with database.reading() as connection:
            return {row.name: (row.until, row.process) for row in connection.execute(select(leases.leases))}

    elsewhere(database, until=-1)
    before = rows()
    for act in (leases.renew, leases.adopt, leases.release):
        with database.writing() as connection:
            act(connection, lease)
        after = rows()
        assert {name for name in after if after[name] != before[name]} == {"b"}, act.__name__
        with database.reading() as connection:
            late = leases.held_leases(connection, "", late=True)
        assert late == (set() if act is leases.release else {"b"}), act.__name__
        assert (after["b"][1] == ANOTHER_MACHINE) == (act is leases.renew)


def test_a_lease_of_another_owner_with_the_same_fence_is_not_released(database) -> None:
    """As after the catalog was restored from a copy."""
    lease = take(database)
    assert lease is not None
    with database.writing() as connection:
        connection.execute(update(leases.leases).values(owner="another"))
        leases.release(connection, lease)
        assert leases.held_leases(connection, "") == {"work"}


def test_an_owner_after_an_outage_goes_on_if_nobody_took_its_lease(database) -> None:
    lease = take(database)
    assert lease is not None
    with database.writing() as connection:
        connection.execute(update(leases.leases).values(until=1.0))
        lease.require(connection)
        leases.renew(connection, lease)
        assert connection.execute(select(leases.leases.c.until)).scalar_one() > leases.clock(connection) + 20


def test_a_killed_owner_on_this_machine_is_replaced_at_once(database, where) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, where], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert not leases.is_free(database, "work", print)  # it lives, so nobody waits
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead too
    assert leases.is_free(database, "work", print)
    lease = take(database)
    holder.communicate()
    assert lease is not None
    assert lease.fence == 2


# --- who is dead ------------------------------------------------------------------------------------------------------

TELL = """
import os, sys
from turret.store import leases
for process in sys.argv[1:]:
    number = process.split("/")[2]
    print(leases.is_dead(process), os.path.exists(f"/proc/{number}/stat"), leases._clock())
"""


def told(prefix: list[str], *processes: str) -> list[list[str]]:
    """What a process that is started by `prefix` says of others: whether dead, and whether it finds them in /proc."""
    tool = shutil.which(prefix[0])
    if tool is None or os.getuid() != 0:
        pytest.skip(f"needs root and {prefix[0]}")
    command = [tool, *prefix[1:], sys.executable, "-c", TELL, *processes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not allow it: {done.stderr.strip()[-200:]}")
    return [line.split() for line in done.stdout.splitlines()]


@pytest.fixture
def living_and_dead() -> Iterator[list[str]]:
    """How a lease names a living process, and one that has ended."""
    ended, living = (subprocess.Popen(["sleep", "100"]) for _ in range(2))
    machine, clock = leases._machine(), leases._clock()
    names = [f"{machine}/{each.pid}/{leases._process_start(str(each.pid))}/{clock}" for each in (living, ended)]
    ended.kill()
    ended.wait()
    yield names
    living.kill()
    living.wait()


def test_a_living_process_of_another_user_is_not_dead_where_proc_hides_it(living_and_dead) -> None:
    hidden = "mount -t proc -o hidepid=2 proc /proc"
    as_nobody = "exec setpriv --reuid=65534 --regid=65534 --clear-groups"
    found = told(["unshare", "-m", "sh", "-c", f'{hidden} && {as_nobody} "$@"', "sh"], *living_and_dead)
    assert [each[:2] for each in found] == [["False", "False"], ["True", "False"]]
    assert [leases.is_dead(each) for each in living_and_dead] == [False, True], "as where nothing is hidden"


def test_a_process_in_another_time_namespace_is_compared_by_its_number_alone(living_and_dead) -> None:
    """There every process seems to have started at another time."""
    found = told(["unshare", "-T", "--boottime", "100000", "-f"], *living_and_dead)
    assert [each[0] for each in found] == ["False", "True"]
    assert found[0][2] != leases._clock()


def test_a_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(living_and_dead) -> None:
    machine, number, start, clock = living_and_dead[0].rsplit("/", 3)
    assert not leases.is_dead(living_and_dead[0])
    assert leases.is_dead(f"{machine}/{number}/{int(start) - 1}/{clock}")
    assert not leases.is_dead(f"{machine}/{number}/{int(start) - 1}/1"), "by another clock"


def test_the_owner_on_another_machine_is_awaited_until_its_lease_ends_or_is_renewed(database, short) -> None:
    lease, lines, started = take(database), list[str](), time.monotonic()
    assert lease is not None
    elsewhere(database, until=0.8)
    assert leases.is_free(database, "work", lines.append)
    assert 0.5 < time.monotonic() - started < 5
    assert lines == ["waiting up to 1 s to see whether the process on far that has work is alive"]
    elsewhere(database, until=2)
    with LeaseRenewer(database, lease):
        assert not leases.is_free(database, "work", lines.append)


def test_a_keeper_renews_and_notices_that_the_lease_is_lost(database, short) -> None:
    lease, lines = take(database), list[str]()
    assert lease is not None
    with LeaseRenewer(database, lease, warn=lines.append) as keeper:
        time.sleep(1.2)
        assert take(database) is None
        keeper.require()
        with database.writing() as connection:
            connection.execute(update(leases.leases).values(owner="other", fence=7))
        deadline = time.monotonic() + 5
        while not keeper.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(LeaseLost):
            keeper.require()
    assert len(lines) == 1
    assert lines[0].startswith("work was taken over")


@pytest.mark.parametrize("text", ["soon", "0.1", "86400"])
def test_a_length_that_makes_no_sense_is_refused(monkeypatch, text) -> None:
    monkeypatch.setenv(leases.VARIABLE, text)
    with pytest.raises(StoreError, match=r"expected seconds from 0\.5 to 3600"):
        leases.lease_seconds()


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_taken_over_is_ended_by_its_new_owner_alone(store, make_bundle) -> None:
    slow = store.new_run("a", "x", "y")
    elsewhere(store.database(), until=-1)
    quick = store.unfinished_run("x", "y")
    assert quick is not None
    assert quick.id == slow.id
    with pytest.raises(LeaseLost, match=rf"jobs/{slow.id} was taken over"):
        store.put("a", make_bundle(b"late"), run=slow)
    with pytest.raises(LeaseLost):
        store.end_run(slow, "failed")
    assert list(store.list()) == []
    assert store.run(slow.id)["state"] == "running"
    assert str(store.put("a", make_bundle(b"right"), run=quick)) == "a@1"
    store.end_run(quick, "finished")
    assert store.run(slow.id)["state"] == "finished"


def test_no_run_stays_running_without_a_process(store) -> None:
    run = store.new_run("a", "x", "y")
    assert store.run(run.id)["state"] == "running"
    elsewhere(store.database(), until=-1)
    assert [(each["state"], "goes on" in each["error"]) for each in store.runs()] == [("interrupted", True)]
    with store.database().reading() as connection:
        assert connection.execute(select(jobs.c.state)).scalar() == "running", "nothing had to be written"


def on_another_machine(store: Store, folder: Path) -> Store:
    return Store(store.location.given.replace("/local", f"/{folder.name}"))


@pytest.mark.slow
def test_a_run_goes_on_on_another_machine_with_its_files(new_url, tmp_path) -> None:
    one = Store(new_url())
    other = on_another_machine(one, tmp_path / "other")
    run = one.new_run("a", "x", "y")
    run.checkpoint.mkdir()
    with one.training_runs().keeper(run, print):
        run.curve.write_text("1\n")
        (run.checkpoint / "checkpoint.safetensors").write_bytes(b"step 1")
        time.sleep(1.5)  # a turn of the keeper
        run.curve.write_text("1\n2\n")
    assert other.training_runs().file(run.id, "curve.jsonl") == b"1\n2\n"
    elsewhere(one.database(), until=-1)
    again = other.unfinished_run("x", "y")
    assert again is not None
    assert again.id == run.id
    assert again.lease.fence > run.lease.fence
    assert again.folder != run.folder
    assert (again.checkpoint / "checkpoint.safetensors").read_bytes() == b"step 1"
    assert again.curve.read_text() == "1\n2\n"
    assert again.recipe.read_text() == "x"

    with other.training_runs().keeper(again, print):
        (again.checkpoint / "checkpoint.safetensors").write_bytes(b"step 2")
    with pytest.raises(LeaseLost), one.training_runs().keeper(run, print):
        (run.checkpoint / "checkpoint.safetensors").write_bytes(b"late")
    other.end_run(again, "interrupted")
    back = one.unfinished_run("x", "y")
    assert back is not None
    assert (back.checkpoint / "checkpoint.safetensors").read_bytes() == b"step 2", "not the one of the slow process"
    one.end_run(back, "finished")
    assert [each.path.rpartition("/")[2] for each in one.artifacts.list_files("runs/")] == [
        "curve.jsonl",
        "recipe.toml",
    ]
    assert one.verify().ok
    assert one.verify().orphans == 0, "what was replaced is removed at once"


def test_the_machine_that_wrote_last_goes_on_with_its_own_files(new_url) -> None:
    """Its last checkpoint may not be in the store, if the object store did not answer."""
    store = Store(new_url())
    run = store.new_run("a", "x", "y")
    run.checkpoint.mkdir()
    (run.checkpoint / "checkpoint.safetensors").write_bytes(b"never copied")
    store.end_run(run, "interrupted")
    again = store.unfinished_run("x", "y")
    assert again is not None
    assert (again.checkpoint / "checkpoint.safetensors").read_bytes() == b"never copied"
    store.end_run(again, "finished")


def test_a_gc_leaves_kept_files_and_verify_finds_a_damaged_one(new_url, tmp_path) -> None:
    store = Store(new_url(str(tmp_path / "files")))
    path = store.root / "comparisons" / "a" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    store.artifacts.keep([path])
    assert store.gc().removed == ()
    assert store.artifacts.read("comparisons/a/report.json") == b"{}"
    (kept,) = (tmp_path / "files" / "blobs").rglob("*-*")
    kept.chmod(0o600)
    kept.write_bytes(b"[]")
    (problem,) = store.verify().problems
    assert problem.where == "comparisons/a/report.json"
