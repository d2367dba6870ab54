"""A full or read-only disk costs one clear line, and what was stored before stays whole."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from small_disk import mounted_disk

from turret.errors import StoreError
from turret.store import Store


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk of its own, with the options that it is given."""
    (tmp_path / "disk").mkdir()
    with ExitStack() as mounted:
        yield lambda options: mounted.enter_context(mounted_disk(tmp_path / "disk", options))


def test_a_full_disk_is_named_and_what_was_stored_before_is_whole(small_disk, make_bundle) -> None:
    disk = small_disk("size=2m")
    store = Store(disk / "store")
    store.put("a", make_bundle(os.urandom(100_000)))
    with pytest.raises(StoreError, match="No space left on device") as error:
        store.put("a", make_bundle(os.urandom(3_000_000)))
    assert str(store.root) in str(error.value)
    assert [str(version) for version in store.list()] == ["a@1"]
    assert len(store.files("a@1")) == 3
    assert list((store.root / "tmp").iterdir()) == []
    store.put("a", make_bundle(os.urandom(100_000)))


def test_a_disk_that_fills_at_any_byte_never_lists_a_broken_version(small_disk, make_bundle) -> None:
    disk = small_disk("size=2m")
    store, filler, stored = Store(disk / "store"), disk / "filler", []
    stored.append(str(store.put("a", make_bundle(os.urandom(1000)))))
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    for room in range(0, 160_000, 8192):
        filler.write_bytes(bytes(max(free - room, 0)))
        with suppress(StoreError):
            stored.append(str(store.put("a", make_bundle(os.urandom(9000)))))
        filler.unlink()
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        assert [str(version) for version in store.list()] == stored
        for reference in stored:
            assert len(store.files(reference)) == 3
    assert len(stored) > 1


def complaint(verb: Callable[[], object]) -> str | None:
    """What a verb says that could not be done; None for one that was."""
    try:
        verb()
    except StoreError as error:
        return str(error)
    return None


def test_on_a_full_disk_every_verb_is_done_or_says_so_and_gc_makes_room(small_disk, make_bundle) -> None:
    disk = small_disk("size=2m")
    store = Store(disk / "store")
    for content in (1, 2, 3):
        store.put("a", make_bundle(os.urandom(1000 * content)))
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    leftover = store.root / "tmp" / "left"
    leftover.write_bytes(bytes(100_000))
    os.utime(leftover, (0, 0))
    filler, verbs = disk / "filler", 0
    for room in (0, 4096, 16384, 40960, 65536, 98304):
        filler.write_bytes(b"")
        filler.write_bytes(bytes(max(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - room, 0)))
        for verb in (
            lambda: store.promote("a@3", "production"),
            lambda: store.rollback("a"),
            lambda: store.gate("a", "candidate", add=["loss<1"]),
            lambda: store.delete("a@3", force=True),
        ):
            said = complaint(verb)
            verbs += said is None
            assert said is None or re.fullmatch(".*(is full|No space left|no a@3|nothing to roll back).*", said), said
    filler.write_bytes(b"")
    filler.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    assert {each.path.partition("/")[0] for each in store.gc().removed} >= {"tmp"}
    assert not leftover.exists()
    assert verbs
    assert len(store.files("a@1")) == len(store.files("a@2")) == 3
    assert str(store.resolve("a@production")) in ("a@1", "a@2")


def test_gc_needs_not_a_byte_of_room(small_disk, make_bundle) -> None:
    """Also without a leftover to begin with: the database itself is read on a disk that has no room for its index."""
    disk = small_disk("size=2m")
    store = Store(disk / "store")
    store.put("a", make_bundle(os.urandom(1000)))
    store.put("a", make_bundle(os.urandom(300_000)))
    store.delete("a@2")
    (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    with pytest.raises(StoreError, match=r"the disk of .* is full"):
        store.promote("a@1", "production")
    assert store.gc(dry_run=True).bytes > 300_000
    assert Store(store.root).gc().bytes > 300_000
    store.promote("a@1", "production")
    assert len(store.files("a@production")) == 3


def test_a_new_store_on_a_full_disk_says_so(small_disk, make_bundle) -> None:
    disk = small_disk("size=64k")
    with pytest.raises(StoreError, match=r"disk of .* is full|No space left on device"):
        Store(disk / "store").put("a", make_bundle(os.urandom(10)))


def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(small_disk, make_bundle, tmp_path) -> None:
    disk = small_disk("size=4m")
    Store(disk / "store").put("a", make_bundle())
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    store = Store(disk / "store")
    assert [str(version) for version in store.list()] == ["a@1"]
    assert store.show("a")["version"] == "a@1"
    store.materialize("a", tmp_path / "out")
    assert store.verify("a").problems[0].path == "adapter_model.safetensors"  # which is none, in this test
    assert store.gc(dry_run=True).removed == ()
    assert list(store.gate("a")) == []
    for write in (
        lambda: store.put("a", make_bundle(b"2")),
        lambda: store.new_run("a", "", ""),
        lambda: store.promote("a", "production"),
        lambda: store.rollback("a"),
        lambda: store.gate("a", "production", add=["loss<1"]),
        lambda: store.delete("a@1"),
        store.gc,
    ):
        with pytest.raises(StoreError, match=r"read-only here|Read-only file system"):
            write()
    with pytest.raises(StoreError, match="Read-only file system"):
        Store(disk / "other").put("a", make_bundle())


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(make_bundle, tmp_path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match="Permission denied"):
            Store(tmp_path / "store").put("a", make_bundle())
    finally:
        tmp_path.chmod(0o755)
