"""If a process is killed during any command, the store still opens, and every listed version is whole."""

from __future__ import annotations

import ast
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from marks import few, slow

from turret.location import Location
from turret.store import Store

FILES = "s3"  # of a store by URL
WRITER = Path(__file__).with_name("writer.py")
KINDS = ["folder", pytest.param("url", marks=pytest.mark.slow)]
EVERY_KILL = pytest.mark.parametrize("where", KINDS, indirect=True)
QUICK = ("promote", "rollback", "gate", "replay", "delete", "gc", "put", "migrate")  # names in `verbs.py`
BESIDE = QUICK[:-1]  # a reader would migrate an older store itself
WITH_TORCH = ("import", "export")
VERBS = "put,put,put,get,promote,promote,rollback,delete,gc,verify"


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(WRITER), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def check(store: Store, acknowledged: set[str]) -> None:
    listed = {str(version) for version in store.list()}
    assert acknowledged <= listed
    if listed:
        assert store.verify().problems == ()


def check_lines(store: Store, lines: list[str]) -> None:
    """Listed versions are those that were put and not deleted, and aliases agree with their history."""
    said = [line.split() for line in lines if line.endswith("\n")]
    put, deleting, deleted = (
        {each for verb, each in said if verb == wanted} for wanted in ("put", "deleting", "delete")
    )
    listed = {str(version) for version in store.list()}
    assert put - deleting <= listed
    assert not deleted & listed
    assert store.verify().problems == ()
    if not listed:
        return
    history = store.show(min(listed))["alias_history"]
    ends = {move["alias"]: move["version"] for move in history}
    found = {alias: version.number for version in store.list() for alias in version.aliases}
    assert found == {alias: number for alias, number in ends.items() if number is not None}


def unfinished(*arguments: object) -> tuple[Counter[str], set[str]]:
    """The rounds by their end, and the versions that were put. The process kills others and checks the store."""
    process = start(*arguments)
    out, err = process.communicate(timeout=560)
    assert process.returncode == 0, err
    *acknowledged, ended = out.splitlines()
    return Counter(ast.literal_eval(ended)), set(acknowledged)


def beside_readers(where: str, folder: Path, *arguments: object) -> tuple[Counter[str], set[str]]:
    """The same, while two processes read everything again and again."""
    Store(where).put("seen", _bundle(folder))
    readers = [start(where, "read") for _ in range(2)]
    try:
        ended = unfinished(where, *arguments)
        for reader in readers:
            out, err = reader.communicate("enough\n", timeout=300)
            assert reader.returncode == 0, err
            assert int(out) > 0
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()
    check(Store(where), {"seen@1"} | ended[1])
    return ended


@EVERY_KILL
def test_killed_at_every_file_operation_of_a_put_nothing_listed_is_broken(where, store, tmp_path) -> None:
    store.new_run("other", "", "")  # the store exists, as is usual
    ended, acknowledged = unfinished(where, "operations", "put", 1, 500)
    assert ended["done"] == 1
    check(store, acknowledged)
    assert str(store.put("a", _bundle(tmp_path))) not in acknowledged


@pytest.mark.parametrize(
    ("where", "verb"),
    [
        *few([("folder", verb) for verb in ("promote", "delete", "migrate", "rollback", "gate", "replay", "gc")], 1),
        *slow(("url", verb) for verb in QUICK if verb != "put"),
        *slow(("folder", verb) for verb in WITH_TORCH),  # they put and materialize
    ],
    indirect=["where"],
)
def test_killed_at_every_file_operation_of_a_verb_it_was_done_or_was_not(where, verb) -> None:
    ended, _ = unfinished(where, "operations", verb, 1, 500)
    assert ended["killed"] > 1
    assert ended["done"] == 1


@pytest.mark.slow
def test_killed_within_a_write_of_any_verb_the_store_holds_what_it_must_and_readers_see_nothing_of_it(tmp_path) -> None:
    """The kernel kills at the write that makes a file longer than n bytes, inside SQLite too."""
    verbs = ",".join(BESIDE)
    ended, acknowledged = beside_readers(str(tmp_path / "store"), tmp_path, "writes", verbs, 150_000, 30_000)
    assert ended["killed"] > len(BESIDE)
    assert ended.total() == 5 * len(BESIDE)
    assert acknowledged


@pytest.mark.slow
def test_a_write_that_fails_within_any_verb_is_said_in_one_line_and_the_verb_not_done(tmp_path) -> None:
    """A file that may not grow, as on a full disk or with a quota, without a disk for the test."""
    ended, _ = unfinished(tmp_path / "store", "limits", ",".join(QUICK), 260_001, 130_000)
    assert ended["said"] >= len(QUICK)
    assert ended["done"]
    assert ended.total() == 3 * len(QUICK)


def _kill_again_and_again(where: str, folder: Path, verb: str, *how: object) -> None:
    if verb == "migrate":  # a reader would migrate the store itself
        ended, _ = unfinished(where, how[0], verb, *how[1:])
    else:
        ended, _ = beside_readers(where, folder, how[0], verb, *how[1:])
    assert ended["killed"]  # the number depends on how far the WAL grew while readers read
    assert ended.total() >= 25


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*QUICK, *WITH_TORCH])
def test_killed_again_and_again_in_any_verb_beside_readers(tmp_path, verb) -> None:
    _kill_again_and_again(str(tmp_path / "store"), tmp_path, verb, "moments", 25, 7)


@pytest.mark.slow
def test_killed_again_and_again_in_all_verbs_of_a_store_by_url_beside_readers(new_url, tmp_path) -> None:
    _kill_again_and_again(new_url(), tmp_path, ",".join(BESIDE), "moments", 6, 7)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*QUICK, *WITH_TORCH])
def test_killed_within_writes_of_many_sizes_beside_readers(tmp_path, verb) -> None:
    step = 10_400 if verb in WITH_TORCH else 5_200  # a round with torch is 10x slower
    _kill_again_and_again(str(tmp_path / "store"), tmp_path, verb, "writes", 260_000, step)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*QUICK, *WITH_TORCH])
def test_a_write_that_fails_at_many_sizes_is_said_in_one_line_and_the_verb_not_done(tmp_path, verb) -> None:
    ended, _ = unfinished(tmp_path / "store", "limits", verb, 260_000, 10_400 if verb in WITH_TORCH else 5_200)
    assert ended.total() >= 25


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "step"), [("folder", 36), ("folder", 3), ("url", 5)])
def test_killed_at_file_operations_of_the_first_put_the_store_still_opens(kind, step, new_url, tmp_path) -> None:
    """Each round starts without a store, so the kill comes while the schema is created."""
    for operation in range(4, 40, step):
        where = new_url() if kind == "url" else str(tmp_path / f"store-{operation}")
        store = Store(where)
        _, acknowledged = unfinished(where, "operations", "put", operation, operation)
        check(store, acknowledged)
        store.put("a", _bundle(tmp_path))


def _kill_at_random_moments(where: str, tmp_path: Path, rounds: int) -> None:
    """Two processes carry out all commands; one is killed, the other continues."""
    store, moments, lines = Store(where), random.Random(0), list[str]()
    store.put("a", _bundle(tmp_path))
    survivor = start(where, "race", 20 * rounds, 1000, VERBS)
    for number in range(rounds):
        process = start(where, "race", 10_000, number, VERBS)
        assert process.stdout is not None
        first = process.stdout.readline()  # it works
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        rest = process.stdout.read()  # communicate would miss what readline has buffered
        process.communicate(timeout=300)
        lines += [first, *rest.splitlines(keepends=True)]
    out, err = survivor.communicate(timeout=600)
    assert survivor.returncode == 0, err
    check_lines(store, lines + out.splitlines(keepends=True))


@pytest.mark.slow
def test_killed_at_random_moments_no_acknowledged_write_is_lost(where, tmp_path) -> None:
    _kill_at_random_moments(where, tmp_path, 4 if Location.parse(where).catalog is None else 2)


@pytest.mark.slow
def test_killed_at_random_moments_a_hundred_times(where, tmp_path) -> None:
    _kill_at_random_moments(where, tmp_path, 100)


def _race(where: str, processes: int, count: int, verbs: str) -> None:
    store = Store(where)
    writers = [start(where, "race", count, seed, verbs) for seed in range(processes)]
    lines: list[str] = []
    for writer in writers:
        out, err = writer.communicate(timeout=900)
        assert writer.returncode == 0, err
        lines += out.splitlines(keepends=True)
    check_lines(store, lines)
    store.gc()
    assert store.verify().orphans == 0
    assert list(store._blobs.leftovers()) == []


@pytest.mark.parametrize(
    ("where", "verbs"),
    slow([(where, verbs) for where in ("folder", "url") for verbs in (VERBS, "put,get,delete,gc")]),
    indirect=["where"],
)
def test_processes_at_all_verbs_at_once_break_nothing(where, verbs) -> None:
    """All put the same few contents again and again, while others delete and collect them."""
    _race(where, 3, 8, verbs)


@pytest.mark.slow
@pytest.mark.parametrize("verbs", [VERBS, "put,get,delete,gc"])
def test_six_processes_at_all_verbs_for_long_break_nothing(where, verbs) -> None:
    _race(where, 6, 300, verbs)


@pytest.mark.parametrize(
    ("where", "processes", "count"),
    [
        pytest.param("folder", 3, 4, marks=pytest.mark.slow),
        pytest.param("folder", 4, 8, marks=pytest.mark.slow),
        pytest.param("url", 3, 3, marks=pytest.mark.slow),
        pytest.param("url", 6, 20, marks=pytest.mark.slow),
    ],
    indirect=["where"],
)
def test_processes_that_put_at_once_get_numbers_of_their_own(where, store, processes, count) -> None:
    """They also create the store at the same time."""
    writers = [start(where, "put", count) for _ in range(processes)]
    acknowledged: list[str] = []
    for writer in writers:
        out, err = writer.communicate(timeout=300)
        assert writer.returncode == 0, err
        acknowledged += out.split()
    assert sorted(acknowledged) == sorted(f"a@{number}" for number in range(1, processes * count + 1))
    check(store, set(acknowledged))


def _bundle(folder: Path) -> Path:
    from store.bundles import tensors, write_bundle

    return write_bundle(folder / "bundles", tensors(999_999))
