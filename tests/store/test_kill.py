"""A process that is killed in the middle of any verb leaves a store that opens, whose every listed version is whole."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turret.store import Store

WRITER = Path(__file__).with_name("writer.py")
EVERY_KILL = pytest.mark.parametrize("where", ["folder", pytest.param("url", marks=pytest.mark.slow)], indirect=True)
VERBS = "put,put,put,get,promote,promote,rollback,delete,gc,verify"


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(WRITER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check(store: Store, acknowledged: set[str]) -> None:
    listed = {str(version) for version in store.list()}
    assert acknowledged <= listed
    if listed:
        assert store.verify().problems == ()


def check_lines(store: Store, lines: list[str]) -> None:
    """What was put and not being deleted is listed, what was deleted is not; aliases are where their history ends."""
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


@EVERY_KILL
def test_killed_at_every_file_operation_of_a_put_nothing_listed_is_broken(where, store, tmp_path) -> None:
    store.new_run("other", "", "")  # the store exists, as it nearly always does
    process = start(where, "put", 1, 500)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    *acknowledged, last = out.split()
    assert last == "done"
    check(store, set(acknowledged))
    assert str(store.put("a", _bundle(tmp_path))) not in acknowledged


@EVERY_KILL
@pytest.mark.parametrize("verb", ["promote", "rollback", "delete", "gc"])
def test_killed_at_every_file_operation_of_a_verb_it_was_done_or_was_not(where, verb) -> None:
    """The writer itself looks, after every kill, at what must hold."""
    process = start(where, verb, 1, 500)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.split() == ["done"]


@pytest.mark.parametrize("kind", ["folder", pytest.param("url", marks=pytest.mark.slow)])
def test_killed_at_every_file_operation_of_the_first_put_the_store_still_opens(kind, new_url, tmp_path) -> None:
    """Every round begins without a store, so that the schema is being made when the kill comes."""
    for operation in range(4, 40, 5):
        where = new_url() if kind == "url" else str(tmp_path / f"store-{operation}")
        store, process = Store(where), start(where, "put", operation, operation)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        check(store, set(out.split()) - {"done"})
        store.put("a", _bundle(tmp_path))


def _kill_at_random_moments(where: str, tmp_path: Path, rounds: int) -> None:
    """Two processes at all verbs; one is killed, the other one goes on."""
    store, moments, lines = Store(where), random.Random(0), list[str]()
    store.put("a", _bundle(tmp_path))
    survivor = start(where, "race", 20 * rounds, 1000, VERBS)
    for number in range(rounds):
        process = start(where, "race", 10_000, number, VERBS)
        assert process.stdout is not None
        first = process.stdout.readline()  # it is at work
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        rest, _ = process.communicate(timeout=60)
        lines += [first, *rest.splitlines(keepends=True)]
    out, err = survivor.communicate(timeout=600)
    assert survivor.returncode == 0, err
    check_lines(store, lines + out.splitlines(keepends=True))


def test_killed_at_random_moments_no_acknowledged_write_is_lost(where, tmp_path) -> None:
    _kill_at_random_moments(where, tmp_path, 4)


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


@pytest.mark.parametrize("verbs", [VERBS, "put,get,delete,gc"])
def test_processes_at_all_verbs_at_once_break_nothing(where, verbs) -> None:
    """All of them put the same few contents again and again, which the others delete and collect."""
    _race(where, 3, 25, verbs)


@pytest.mark.slow
@pytest.mark.parametrize("verbs", [VERBS, "put,get,delete,gc"])
def test_six_processes_at_all_verbs_for_long_break_nothing(where, verbs) -> None:
    _race(where, 6, 300, verbs)


def test_processes_that_put_at_once_get_numbers_of_their_own(where, store) -> None:
    """Among them they also make the store: it does not exist before."""
    writers = [start(where, "put", 8) for _ in range(4)]
    acknowledged: list[str] = []
    for writer in writers:
        out, err = writer.communicate(timeout=120)
        assert writer.returncode == 0, err
        acknowledged += out.split()
    assert sorted(acknowledged) == sorted(f"a@{number}" for number in range(1, 33))
    check(store, set(acknowledged))


def _bundle(folder: Path) -> Path:
    from store.bundles import tensors, write_bundle

    return write_bundle(folder / "bundles", tensors(999_999))
