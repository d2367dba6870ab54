"""`gc` removes everything that nothing refers to, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
from compiled_kernels import COMPILER
from store import by_hand
from store.bundles import tensors, write_bundle
from store.by_hand import age, everything, forget_uploads

from turret.database import Database
from turret.errors import StoreError
from turret.store import Store, artifacts, catalog, scratch, upkeep
from turret.store.blobs import Blob, hash_file
from turret.store.uploads import Upload

FILES = "s3"  # of a store by URL


def test_the_files_of_a_deleted_version_go_and_shared_ones_stay(store, put) -> None:
    put(), put()
    kept = everything(store)
    third = put()
    store.delete(str(third))
    would = store.gc(dry_run=True)
    assert len(everything(store)) == len(kept) + 2
    done = store.gc()
    assert (would.dry_run, done.dry_run) == (True, False)
    assert would.removed == done.removed
    assert done.bytes == sum(each.bytes for each in done.removed) > 0
    assert {each.why for each in done.removed} == {"no version lists it"}
    assert everything(store) == kept
    assert store.verify().orphans == 0
    assert store.gc().removed == ()


@pytest.mark.slow
def test_a_listed_file_is_never_removed(store, put) -> None:
    for _ in range(3):
        put()
    before = everything(store)
    assert store.gc().removed == ()
    assert everything(store) == before
    assert store.verify().ok


def test_leftovers_go_once_they_are_old_and_not_before(folder_store, put) -> None:
    store = folder_store
    put()
    old, new = store.root / "tmp" / "old", store.root / "tmp" / "new"
    for path in (old, new):
        path.write_bytes(b"12345")
    age(old)
    assert [(each.path, each.bytes, each.why) for each in store.gc().removed] == [
        ("tmp/old", 5, "leftover of a killed writer")
    ]
    assert (old.exists(), new.exists()) == (False, True)


def test_a_finished_runs_checkpoint_goes_and_every_other_stays(store) -> None:
    held = {}
    for state in ("finished", "failed", "interrupted", "running"):
        run = store.new_run("a", f"# {state}", "")
        for name in ("checkpoint", "bundle-x1"):
            (run.folder / name).mkdir()
            (run.folder / name / "state.safetensors").write_bytes(b"123")
        if state != "running":
            store.end_run(run, state)
        held[state] = run
    removed = [(each.path.rpartition("/")[2], each.bytes) for each in store.gc().removed]
    assert sorted(removed) == [("bundle-x1", 3), ("checkpoint", 3)]
    for state, run in held.items():
        assert run.checkpoint.exists() == (state != "finished"), state
        assert run.recipe.exists()
    store.end_run(held["running"], "finished")


def test_a_run_that_never_began_goes_once_it_is_old(store) -> None:
    store.end_run(store.new_run("a", "x", ""), "interrupted")
    young, old, foreign = (
        store.root / "runs" / name for name in ("20260101-000000-aaaaaa", "20260101-000000-bbbbbb", "mine")
    )
    for folder in (young, old, foreign):
        folder.mkdir()
        (folder / "recipe.toml").write_text("x")
    age(old), age(foreign)
    assert [each.path for each in store.gc().removed] == ["runs/20260101-000000-bbbbbb"]
    assert young.exists()
    assert foreign.exists()
    assert len(list((store.root / "runs").iterdir())) == 3


class Collecting:
    """Files for which a gc runs after each of the first `most` writes; `old`: as if an hour later."""

    def __init__(self, store: Store, most: int = 1000, *, old: bool) -> None:
        self._store, self._files, self._most, self._old = Store(store.location), store._blobs, most, old
        self.written: list[Blob] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._files, name)

    def put(self, source: Path, blob: Blob) -> None:
        self._files.put(source, blob)
        self.written.append(blob)
        if len(self.written) <= self._most:
            if self._old:
                forget_uploads(self._store)
            self._store.gc()
            assert (self._files.glance(blob) is not None) == self._old


def test_a_gc_leaves_what_a_put_at_work_has_written(store, make_bundle, put) -> None:
    put()
    store._blobs = Collecting(store, old=False)
    version = store.put("b", make_bundle(tensors(500), more=b"x", **{"adapter_config.json": b"{ }"}))
    assert len(store._blobs.written) == 4
    assert len(store.files(str(version))) == 4
    assert store.verify().orphans == 0


def test_a_put_whose_files_were_collected_as_abandoned_writes_them_again_under_new_names(store, make_bundle) -> None:
    """For example after a jump of the clock, or a file that takes more than an hour."""
    store.new_run("other", "", "")
    store._blobs = Collecting(store, 4, old=True)
    version = store.put("b", make_bundle(tensors(501), more=b"x"))
    names = Counter(blob.digest for blob in store._blobs.written)
    assert set(names.values()) == {2}
    assert len({(blob.digest, blob.upload) for blob in store._blobs.written}) == 8
    assert len(store.files(str(version))) == 4
    assert store.verify().ok


@pytest.mark.slow
def test_a_put_whose_files_are_collected_again_and_again_says_so(store, make_bundle) -> None:
    store.new_run("other", "", "")
    store._blobs = Collecting(store, old=True)
    complaint = r"b was not stored: `turret gc` removed its files 8 times .*: try again"
    with pytest.raises(StoreError, match=complaint) as said:
        store.put("b", make_bundle(tensors(502)))
    assert len(str(said.value)) < 300
    assert list(store.list()) == []
    store.gc()
    assert store.verify().orphans == 0


@pytest.mark.slow
def test_what_a_killed_put_wrote_goes_once_it_is_old(store, make_bundle, put) -> None:
    put()
    bundle = make_bundle(tensors(503))
    _, paths = artifacts.read_bundle(bundle)
    Upload(store.database(), store._blobs).write({hash_file(path): path for path in paths.values()})
    assert store.gc().removed == ()
    assert store.verify().orphans == 0
    forget_uploads(store)
    would = store.gc(dry_run=True)
    assert store.verify().orphans == len(would.removed) == 2  # another version has the same configuration
    assert store.gc().removed == would.removed
    assert str(store.put("a", bundle)) == "a@2"
    assert store.verify().ok


def test_what_a_put_that_failed_had_written_goes_at_once(store, make_bundle, put) -> None:
    put()
    bundle = make_bundle(tensors(504))
    store._blobs = Failing(store)
    with pytest.raises(StoreError, match="no more"):
        store.put("a", bundle)
    store._blobs = store._blobs._files
    assert len(store.gc().removed) == 1
    assert store.verify().orphans == 0


class Failing:
    """Files of which the first can be written and the second cannot."""

    def __init__(self, store: Store) -> None:
        self._files, self._puts = store._blobs, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._files, name)

    def put(self, source: Path, blob: Blob) -> None:
        self._puts += 1
        if self._puts > 1:
            raise StoreError("no more")
        self._files.put(source, blob)


@pytest.mark.parametrize("alone", [False, True])
def test_a_gc_beside_a_put_that_is_listing_its_files_removes_none(store, make_bundle, put, alone) -> None:
    put()
    bundle = make_bundle(tensors(505))
    manifest, paths = artifacts.read_bundle(bundle)
    content = artifacts.hash_bundle(manifest, paths)
    upload = Upload(store.database(), store._blobs)
    upload.write({blob: paths[path] for path, blob in content.items()})
    collected: list[list[upkeep.Removed]] = []

    def collect() -> None:
        database = Database.open_catalog(store._catalog, alone=alone)  # alone: as on a full disk
        collected.append(list(upkeep.remove_unlisted(store._blobs, database, dry_run=False)))

    other = threading.Thread(target=collect)
    with store.database().writing() as connection:
        copies = upload.settle(connection, content.values())
        other.start()
        other.join(timeout=0.5 if alone else 10)
        kept = {path: copies[blob.digest] for path, blob in content.items()}
        catalog.add(connection, "b", manifest, kept, run=None, metrics={})
    other.join(timeout=60)
    assert collected == [[]]
    assert len(store.files("b@1")) == 3


def test_two_puts_of_one_content_at_once_list_one_copy(store, make_bundle) -> None:
    store.new_run("other", "", "")
    bundle, other = make_bundle(tensors(506)), Store(store.location)
    manifest, paths = artifacts.read_bundle(bundle)
    content = artifacts.hash_bundle(manifest, paths)
    upload = Upload(store.database(), store._blobs)
    upload.write({blob: paths[path] for path, blob in content.items()})
    assert str(other.put("a", bundle)) == "a@1"
    with store.database().writing() as connection:
        copies = upload.settle(connection, content.values())
    assert {copy.upload for copy in copies.values()} == {by_hand.copy(store, "a", "manifest.json").upload}
    assert len(store.gc().removed) == 3
    assert store.verify().ok


def test_what_was_listed_when_a_put_looked_and_collected_since_is_written(store, make_bundle) -> None:
    bundle = make_bundle(tensors(507))
    store.put("a", bundle)
    manifest, paths = artifacts.read_bundle(bundle)
    content = artifacts.hash_bundle(manifest, paths)
    upload = Upload(store.database(), store._blobs)
    upload.write({blob: paths[path] for path, blob in content.items()})
    store.delete("a@1")
    with store.database().writing() as connection:
        assert upload.settle(connection, content.values()) is None
    store.gc()
    assert str(store.put("a", bundle)) == "a@2"
    assert store.verify().ok


def test_gc_without_a_store_makes_none(store) -> None:
    assert store.gc().removed == ()
    assert not store.root.exists()


# --- clocks of other machines -----------------------------------------------------------------------------------------

GC = """
import os, sys, time
from turret.store import Store
print(time.time() - float(sys.argv[2]), flush=True)
print(*(each.path for each in Store(sys.argv[1]).gc().removed), sep="\\n")
"""


@pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")
def test_a_gc_of_a_machine_two_hours_ahead_leaves_what_is_being_written_on_a_shared_folder(new_url, tmp_path) -> None:
    files, library, source = tmp_path / "files", tmp_path / "clock_ahead.so", tmp_path / "source"
    store = Store(new_url(str(files)))
    store.put("a", write_bundle(tmp_path / "bundles", tensors(1)))
    content = tensors(700)
    blob, sent = Blob(f"sha256:{sha256(content).hexdigest()}", len(content), "0" * 32), list[BaseException]()
    os.mkfifo(source)  # a put that has read half of its file

    def put() -> None:
        try:
            store._blobs.put(source, blob)
        except BaseException as error:
            sent.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    with source.open("wb", buffering=0) as pipe:
        pipe.write(content[:100])
        while not (temporary := list((files / "tmp").iterdir())):
            time.sleep(0.01)
        began = store.root / "runs" / "20260101-000000-aaaaaa"
        began.mkdir(parents=True)
        (files / "tmp" / "abandoned").write_bytes(b"1")
        age(files / "tmp" / "abandoned")
        with scratch.folder(store.root) as working:
            source_of_clock = Path(__file__).parents[1] / "clock_ahead.c"
            command = [str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(library), str(source_of_clock), "-ldl"]
            subprocess.run(command, check=True)
            environment = os.environ | {"LD_PRELOAD": str(library), "AHEAD": "7200"}
            command = [sys.executable, "-c", GC, str(store.location.given), str(time.time())]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            ahead, *removed = done.stdout.split()
            assert float(ahead) > 7000, "the clock of that machine"
            assert removed == ["tmp/abandoned"]
            assert working.exists()
        assert temporary[0].exists()
        assert began.exists()
        pipe.write(content[100:])
    thread.join()
    assert sent == []
    store._blobs.check(blob)
