"""`gc` removes what nothing refers to, all of it, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from store.by_hand import age, everything

from turret.database import Database
from turret.store import Store, catalog, gc, incoming
from turret.store.blobs import Blob


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
    assert sorted(each.path.rpartition("/")[2] for each in store.gc().removed) == ["bundle-x1", "checkpoint"]
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
    """Files where a gc comes after every one that is written, until all four are."""

    def __init__(self, store: Store) -> None:
        self._store, self._files, self.calls = Store(store.location), store._blobs, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._files, name)

    def put(self, source: Path) -> Blob:
        blob = self._files.put(source)
        self.calls += 1
        if self.calls <= 4:
            self._store.gc()
            assert not self._files.has(blob.digest)
        return blob


def test_a_put_whose_files_a_gc_removed_before_they_were_listed_writes_them_again(store, make_bundle, put) -> None:
    put()
    store._blobs = Collecting(store)
    version = store.put("b", make_bundle(b"written, removed, written", more=b"x", **{"adapter_config.json": b"{ }"}))
    assert store._blobs.calls == 8
    assert len(store.files(str(version))) == 4


@pytest.mark.parametrize("alone", [False, True])
def test_a_gc_waits_for_a_put_that_is_listing_its_files(store, make_bundle, put, alone) -> None:
    """Were it to look before and remove after, the put would list what is gone."""
    put()
    bundle = make_bundle(b"about to be listed")
    manifest, paths = incoming.read(bundle)
    content = {path: store._blobs.put(file) for path, file in paths.items()}
    collected: list[list[gc.Removed]] = []

    def collect() -> None:
        database = Database(store._catalog, alone=alone)  # alone: as on a full disk
        collected.append(list(gc.unlisted(store._blobs, database, dry_run=False)))

    other = threading.Thread(target=collect)
    with store._made().writing() as connection:
        other.start()
        other.join(timeout=0.5)
        assert other.is_alive()
        catalog.add(connection, "b", manifest, content, run=None, metrics={})
    other.join(timeout=60)
    assert collected == [[]]
    assert len(store.files("b@1")) == 3


def test_gc_without_a_store_makes_none(store) -> None:
    assert store.gc().removed == ()
    assert not store.root.exists()
