"""A process that is killed in the middle of a put leaves a store that opens, whose every listed version is whole."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turret.store import Store

WRITER = Path(__file__).with_name("writer.py")


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(WRITER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check(store: Store, acknowledged: set[str]) -> None:
    listed = {str(version) for version in store.list()}
    assert acknowledged <= listed
    for reference in listed:
        assert "adapter_model.safetensors" in store.files(reference)


def test_killed_at_every_file_operation_of_a_put_nothing_listed_is_broken(tmp_path) -> None:
    store = Store(tmp_path / "store")
    store.new_run("other", "", "")  # the store exists, as it nearly always does
    process = start(store.root, "a", 1, 500)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    *acknowledged, last = out.split()
    assert last == "done"
    check(store, set(acknowledged))
    assert str(store.put("a", _bundle(tmp_path))) not in acknowledged


def test_killed_at_every_file_operation_of_the_first_put_the_store_still_opens(tmp_path) -> None:
    """Every round begins without a store, so that the schema is being made when the kill comes."""
    for operation in range(4, 40, 5):
        store = Store(tmp_path / f"store-{operation}")
        process = start(store.root, "a", operation, operation)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        check(store, set(out.split()) - {"done"})
        store.put("a", _bundle(tmp_path))


def _kill_at_random_moments(tmp_path: Path, rounds: int) -> None:
    store, moments, acknowledged = Store(tmp_path / "store"), random.Random(0), set()
    store.put("a", _bundle(tmp_path))
    for _ in range(rounds):
        process = start(store.root, "a", 10_000)
        assert process.stdout is not None
        first = process.stdout.readline()  # it is at work
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        rest, _ = process.communicate(timeout=60)
        acknowledged |= {line for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")}
        check(store, {line.strip() for line in acknowledged})


def test_killed_at_random_moments_no_acknowledged_version_is_lost(tmp_path) -> None:
    _kill_at_random_moments(tmp_path, 6)


@pytest.mark.slow
def test_killed_at_random_moments_a_hundred_times(tmp_path) -> None:
    _kill_at_random_moments(tmp_path, 100)


def test_processes_that_put_at_once_get_numbers_of_their_own(tmp_path) -> None:
    """Among them they also make the store: it does not exist before."""
    store = Store(tmp_path / "store")
    writers = [start(store.root, "a", 8) for _ in range(4)]
    acknowledged: list[str] = []
    for writer in writers:
        out, err = writer.communicate(timeout=120)
        assert writer.returncode == 0, err
        acknowledged += out.split()
    assert sorted(acknowledged) == sorted(f"a@{number}" for number in range(1, 33))
    check(store, set(acknowledged))


def _bundle(folder: Path) -> Path:
    from store.bundles import write_bundle

    return write_bundle(folder / "bundles", b"after the kills")
