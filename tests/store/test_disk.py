"""On a full or read-only disk a command fails with one clear line, and stored versions stay whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from small_disk import mounted_disk
from store.bundles import tensors

from turret.cli.main import run as command
from turret.errors import StoreError
from turret.store import Store, scratch
from turret.store.golden import Example, GoldenReplay, GoldenSet

GOLDEN = GoldenSet((Example("a great film", "label", "good"),))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk with the given options."""
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
    """The error text of a command; None if it succeeded."""
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
    filler, verbs, gated = disk / "filler", 0, []

    def gate() -> None:
        store.gate("a", "candidate", add=["loss<1"], examples=GOLDEN)
        gated.append(True)

    def replay() -> None:
        if gated:  # a replay belongs to examples that the store has
            store.keep_replay(store.resolve("a@1"), GoldenReplay(GOLDEN.digest, 1, 1, None, "then"))

    for room in (0, 4096, 16384, 40960, 65536, 98304):
        filler.write_bytes(b"")
        filler.write_bytes(bytes(max(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - room, 0)))
        for verb in (
            lambda: store.promote("a@3", "production"),
            lambda: store.rollback("a"),
            gate,
            replay,
            lambda: store.put("b", make_bundle(os.urandom(5000))),
            lambda: store.new_run("a", "", ""),
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
    """Even with no leftovers to remove first: it reads the database on a disk too full for its index."""
    disk = small_disk("size=2m")
    store = Store(disk / "store")
    store.put("a", make_bundle(os.urandom(1000)))
    store.put("a", make_bundle(os.urandom(300_000)))
    store.delete("a@2")
    (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    with pytest.raises(StoreError, match="its disk is full"):
        store.promote("a@1", "production")
    assert store.gc(dry_run=True).bytes > 300_000
    assert Store(store.root).gc().bytes > 300_000
    store.promote("a@1", "production")
    assert len(store.files("a@production")) == 3


def fill(disk: Path) -> None:
    """Fill the disk to the last byte."""
    (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    assert os.statvfs(disk).f_bavail == 0


def two_promoted(root: Path, make_bundle: Callable[..., Path]) -> Store:
    store = Store(root)
    for number in (1, 2):
        store.put("a", make_bundle(tensors(number)), metrics={"test": {"loss": 0.1}})
        store.promote(f"a@{number}", "production")
    store.gate("a", "production", add=["loss<1"], examples=GOLDEN)
    store.keep_replay(store.resolve("a@1"), GoldenReplay(GOLDEN.digest, 1, 1, None, "then"))
    return store


def read_all(store: Store, out: Path) -> None:
    """All operations that read."""
    assert [str(version) for version in store.list()] == ["a@1", "a@2"]
    assert str(store.resolve("a")) == "a@2"
    assert len(store.show("a@1")["replays"]) == 1
    assert len(store.files("a@1")) == 3
    assert store.materialize("a", out).number == 2
    assert store.diff("a@1", "a@2").moved is not None
    assert len(store.gate("a")) == 2
    assert store.examples(GOLDEN.digest) == GOLDEN
    assert store.verify().ok
    assert store.problems() == []
    assert store.gc(dry_run=True).removed == ()


@pytest.mark.parametrize("left", ["closed", "killed"])
def test_everything_can_be_read_on_a_disk_without_a_byte_to_spare(small_disk, make_bundle, tmp_path, left) -> None:
    """Also if a killed writer left a journal without an index, and after a write that failed."""
    disk = small_disk("size=2m")
    two_promoted(disk / "store", make_bundle).promote("a@1", "production")
    if left == "killed":
        killed = (
            "import os, signal, sys; from turret.store import Store\n"
            "with Store(sys.argv[1]).database(make=True).reading():\n"  # so that the journal is not checkpointed
            "    Store(sys.argv[1]).rollback('a')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", killed, str(disk / "store")], check=False)
        (disk / "store" / "turret.db-shm").unlink()
        assert (disk / "store" / "turret.db-wal").stat().st_size
    else:
        Store(disk / "store").rollback("a")
    fill(disk)
    read_all(Store(disk / "store"), tmp_path / "1")
    with pytest.raises(StoreError, match="its disk is full"):
        Store(disk / "store").promote("a@1", "production")
    read_all(Store(disk / "store"), tmp_path / "2")


def test_readers_beside_each_other_on_a_full_disk_wait_for_each_other(small_disk, make_bundle) -> None:
    disk = small_disk("size=2m")
    two_promoted(disk / "store", make_bundle)
    fill(disk)
    code = "import sys; from turret.store import Store\nfor _ in range(20): assert len(Store(sys.argv[1]).list()) == 2"
    command = [sys.executable, "-c", code, str(disk / "store")]
    readers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for reader in readers:
        _, err = reader.communicate(timeout=60)
        assert reader.returncode == 0, err


def use_up_inodes(disk: Path) -> list[Path]:
    """Create empty files until there is no inode left. Returns them."""
    made = []
    with suppress(OSError):
        while True:
            made.append(disk / f"file-{len(made)}")
            made[-1].touch()
    return [path for path in made if path.exists()]


WRITE = """
import sys
from turret.store import Store
with Store(sys.argv[1]).database().writing() as connection:
    print("began", flush=True)
"""


@pytest.mark.slow
def test_without_a_free_inode_everything_can_be_read_and_gc_makes_room(small_disk, make_bundle, tmp_path) -> None:
    disk = small_disk("size=8m,nr_inodes=120")
    store = two_promoted(disk / "store", make_bundle)
    store.delete("a@1", force=True)
    fillers = use_up_inodes(disk)
    assert os.statvfs(disk).f_favail == 0
    assert os.statvfs(disk).f_bavail > 100
    reopened = Store(disk / "store")
    assert [str(version) for version in reopened.list()] == ["a@2"]
    reopened.materialize("a@2", tmp_path / "out")
    with pytest.raises(StoreError, match="no room for another file") as error:
        reopened.delete("a@2", force=True)
    assert len(str(error.value)) < 300
    with reopened.database().reading():  # nobody opens the catalog meanwhile, even if there is room again
        fillers.pop().unlink(), fillers.pop().unlink()
        command = [sys.executable, "-c", WRITE, str(reopened.root)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(2.5)
    assert writer.communicate(timeout=60)[0] == "began\n"
    fillers += use_up_inodes(disk / "store" / "tmp")
    assert os.statvfs(disk).f_favail == 0
    assert [each.why for each in Store(disk / "store").gc().removed] != []
    assert os.statvfs(disk).f_favail > 0
    assert [str(version) for version in reopened.list()] == ["a@2"]
    assert reopened.verify().ok or reopened.verify().orphans == 0
    reopened.delete("a@2", force=True)


def test_without_a_free_inode_a_gc_with_nothing_to_remove_says_nothing(small_disk, make_bundle) -> None:
    disk = small_disk("size=8m,nr_inodes=120")
    store = two_promoted(disk / "store", make_bundle)
    use_up_inodes(disk)
    assert Store(store.root).gc().removed == ()


def test_a_new_store_on_a_full_disk_says_so(small_disk, make_bundle) -> None:
    disk = small_disk("size=64k")
    with pytest.raises(StoreError, match=r"its disk is full|No space left on device"):
        Store(disk / "store").put("a", make_bundle(os.urandom(10)))


def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(small_disk, make_bundle, tmp_path) -> None:
    disk = small_disk("size=4m")
    Store(disk / "store").put("a", make_bundle())
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    store = Store(disk / "store")
    assert [str(version) for version in store.list()] == ["a@1"]
    assert store.show("a")["version"] == "a@1"
    store.materialize("a", tmp_path / "out")
    assert store.verify("a").problems[0].path == "adapter_model.safetensors"  # empty in this test
    assert store.gc(dry_run=True).removed == ()
    assert list(store.gate("a")) == []
    version = store.resolve("a")
    for write in (
        lambda: store.put("a", make_bundle(b"2")),
        lambda: store.new_run("a", "", ""),
        lambda: store.promote("a", "production"),
        lambda: store.rollback("a"),
        lambda: store.gate("a", "production", add=["loss<1"]),
        lambda: store.gate("a", "production", examples=GOLDEN),
        lambda: store.keep_replay(version, GoldenReplay(GOLDEN.digest, 1, 1, None, "then")),
        lambda: store.delete("a@1"),
        store.gc,
    ):
        with pytest.raises(StoreError, match=r"read-only here|Read-only file system"):
            write()
    with pytest.raises(StoreError, match="Read-only file system"):
        Store(disk / "other").put("a", make_bundle())


def test_a_queue_on_a_read_only_store_is_said_in_one_line(small_disk, make_bundle, tmp_path, capsys) -> None:
    disk = small_disk("size=4m")
    Store(disk / "store").put("a", make_bundle())
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    (tmp_path / "a.csv").write_text("text,label\ngood,1\nbad,0\n")
    (tmp_path / "base").mkdir()
    where = ["--store", str(disk / "store")]
    submit = ["train", str(tmp_path / "a.csv"), "--base", str(tmp_path / "base"), "--name", "a", "--queue"]
    for verb in (submit, ["worker", "--until-empty"]):
        assert command([*verb, *where]) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search("read-only here|Read-only file system|cannot be written", said), said
        assert "bug in turret" not in said
    with pytest.raises(StoreError, match="cannot be written: Read-only file system"), scratch.folder(disk / "store"):
        raise AssertionError("there is no such folder")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(make_bundle, tmp_path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match="Permission denied"):
            Store(tmp_path / "store").put("a", make_bundle())
    finally:
        tmp_path.chmod(0o755)
