"""A new store is readable only by its owner. An existing folder keeps its permissions, so a group can share it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import func, select
from store.bundles import tensors, write_bundle

from turret.database import Database, versions
from turret.store import Store

pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def fill(root: Path, bundles: Path, number: int = 1) -> Store:
    store = Store(root)
    store.put("a", write_bundle(bundles, tensors(number)))
    store.new_run("a", "recipe", "data")
    return store


def modes(root: Path) -> dict[str, str]:
    """Modes of the folders and files of the store, without the digests in their names."""
    (two,) = {path.parent.name for path in sorted((root / "blobs" / "sha256").glob("??/*"))[:1]}
    names = ("turret.db", "blobs", "tmp", "runs", "blobs/sha256", f"blobs/sha256/{two}")
    blob = next((root / "blobs" / "sha256" / two).iterdir())
    return {"root": mode(root), **{name.replace(two, "ab"): mode(root / name) for name in names}, "blob": mode(blob)}


def test_a_new_store_is_its_owners_alone(tmp_path: Path) -> None:
    store = fill(tmp_path / "deep" / "store", tmp_path / "bundles")
    folders = dict.fromkeys(("root", "blobs", "tmp", "runs", "blobs/sha256", "blobs/sha256/ab"), "0o700")
    assert modes(store.root) == {**folders, "turret.db": "0o600", "blob": "0o400"}
    with store.database().writing():
        for end in ("-wal", "-shm"):
            assert mode(store.root / f"turret.db{end}") == "0o600"
    assert mode(tmp_path / "deep") == oct(0o777 & ~_umask())  # the folder above has the usual mode


def test_a_folder_that_is_shared_with_a_group_stays_so(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o2770)
    store = fill(tmp_path / "store", tmp_path / "bundles")
    folders = dict.fromkeys(("root", "blobs", "tmp", "runs", "blobs/sha256", "blobs/sha256/ab"), "0o2770")
    assert modes(store.root) == {**folders, "turret.db": "0o660", "blob": "0o440"}


def test_a_store_that_was_there_keeps_its_permissions(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", tmp_path / "bundles")
    for path in (store.root, *store.root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o444 if path.parent.parent.name == "sha256" else 0o644)
    before = {path: mode(path) for path in store.root.rglob("*")}
    fill(store.root, tmp_path / "bundles", 2)
    assert {path: mode(path) for path in before} == before
    blobs = [path for path in store.root.glob("blobs/sha256/??/*") if path not in before]
    assert blobs
    assert {mode(path) for path in blobs} == {"0o444"}
    assert {mode(path.parent) for path in blobs} == {"0o755"}


def test_the_files_of_a_store_by_url_are_their_owners_alone(new_url, tmp_path: Path) -> None:
    store = Store(new_url(files=tmp_path / "files"))
    store.put("a", write_bundle(tmp_path / "bundles", tensors(1)))
    store.new_run("a", "recipe", "data")
    assert mode(tmp_path / "files") == mode(store.root) == "0o700"
    assert mode(tmp_path / "files" / "catalog") == "0o600"
    assert {mode(path) for path in (tmp_path / "files").glob("blobs/sha256/??/*")} == {"0o400"}


def test_a_reader_that_may_not_write_sees_what_others_write_after_it_came(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", tmp_path / "bundles")
    reader = Database.open_catalog(store.root / "turret.db", read_only=True)

    def seen() -> int:
        with reader.reading() as connection:
            return connection.execute(select(func.count()).select_from(versions)).scalar_one()

    assert seen() == 1
    with store.database().reading():  # so that what is put stays in the WAL
        store.put("b", write_bundle(tmp_path / "bundles", tensors(2)))
        assert seen() == 2


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


SYNCED = """
import os, sys
from pathlib import Path
folders, made = set(), os.fsync
def fsync(handle):
    folders.add(os.readlink(f"/proc/self/fd/{handle}"))
    made(handle)
os.fsync = fsync
from turret.store import Store
store, bundle = Store(sys.argv[1]), Path(sys.argv[2])
store.put("a", bundle)
run = store.new_run("a", "recipe", "data")
print(*sorted(folders), run.folder, sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which folder was flushed")
def test_every_folder_that_got_a_new_folder_is_flushed(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundles", tensors(1))
    command = [sys.executable, "-c", SYNCED, str(tmp_path / "store"), str(bundle)]
    *synced, _ = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    root = tmp_path / "store"
    new = [path for path in root.rglob("*") if path.is_dir()]
    assert {root, root / "runs", root / "blobs" / "sha256"} <= {root, *new}
    assert {str(path.parent) for path in (root, *new)} <= set(synced)
