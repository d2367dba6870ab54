"""The store keeps its content unchanged, and errors name what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from sqlalchemy import insert, select
from store import by_hand

from turret import database as db
from turret.errors import BadReference, BundleError, Corrupt, NotFound, StoreError
from turret.store import Store, fold_comparisons

FILES = "s3"  # of a store by URL


def test_what_is_put_comes_back_bit_for_bit(store, make_bundle, tmp_path) -> None:
    bundle = make_bundle(os.urandom(3_000_000))
    version = store.put("sentiment", bundle, run="20260101-000000-abcdef", metrics={"test": {"accuracy": 0.9}})
    assert str(version) == "sentiment@1"
    assert version.metrics == {"test": {"accuracy": 0.9}}
    assert store.materialize("sentiment", tmp_path / "out") == version
    assert sorted(p.name for p in bundle.iterdir()) == sorted(p.name for p in (tmp_path / "out").iterdir())
    for path in bundle.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert store.files("sentiment@1")[path.name].read_bytes() == path.read_bytes()
    assert version.bytes == sum(path.stat().st_size for path in bundle.iterdir())


def test_versions_of_a_name_are_numbered_and_names_are_apart(store, make_bundle) -> None:
    assert [str(store.put("a", make_bundle(b"%d" % i))) for i in range(3)] == ["a@1", "a@2", "a@3"]
    assert str(store.put("b", make_bundle(b"1"))) == "b@1"
    assert [str(version) for version in store.list()] == ["a@1", "a@2", "a@3", "b@1"]
    assert [str(version) for version in store.list("b")] == ["b@1"]
    assert list(store.list("c")) == []


def test_the_same_content_under_the_same_name_keeps_its_number(store, make_bundle) -> None:
    first = store.put("a", make_bundle(b"same"), metrics={"test": {"accuracy": 0.5}})
    store.put("a", make_bundle(b"other"))
    assert store.put("a", make_bundle(b"same"), metrics={"test": {"accuracy": 0.1}}) == first
    assert len(store.list()) == 2


def test_the_same_content_is_kept_once(store, make_bundle) -> None:
    content = os.urandom(100_000)
    for name in ("a", "b", "c"):
        store.put(name, make_bundle(content))
    assert sum(blob.bytes for _, blob in store._blobs.walk()) < 110_000
    assert list(store._blobs.leftovers()) == []


@pytest.mark.slow
def test_a_plain_name_is_production_where_that_alias_exists_else_the_newest(store, make_bundle) -> None:
    for i in range(3):
        store.put("a", make_bundle(b"%d" % i))
    assert store.resolve("a").number == 3
    _point(store, "production", 2)
    _point(store, "candidate", 3)
    assert store.resolve("a").number == 2
    assert store.resolve("a").aliases == ("production",)
    assert store.resolve("a@candidate").number == 3
    assert store.resolve("a@1").aliases == ()
    assert [version.aliases for version in store.list()] == [(), ("production",), ("candidate",)]


COMPARISON = "comparisons/a-0123456789"


def test_a_version_of_a_comparison_never_answers_to_a_plain_name(store, make_bundle) -> None:
    store.put("a", make_bundle(b"own"))
    for i in range(3):
        store.put("a", make_bundle(b"%d" % i), comparison=COMPARISON)
    assert store.resolve("a").number == 1
    assert store.resolve("a@3").comparison == COMPARISON
    store.promote("a@4", "candidate")
    assert (store.resolve("a").number, store.resolve("a@candidate").number) == (1, 4)
    store.promote("a@3", "production")
    assert (store.resolve("a").number, store.resolve("a@3").comparison) == (3, None)
    store.put("a", make_bundle(b"another of one's own"))
    store.delete("a@3", force=True)  # and with it the alias
    assert store.resolve("a").number == 5


def test_a_name_that_only_comparisons_trained_says_how_to_choose_one(store, make_bundle) -> None:
    store.put("a", make_bundle(b"1"), comparison=COMPARISON)
    with pytest.raises(NotFound) as error:
        store.resolve("a")
    expected = (
        "no a: a has only versions of comparisons (version 1 and no alias): "
        "choose one with `turret promote a@NUMBER production`"
    )
    assert str(error.value) == expected
    store.promote("a@1", "production")
    assert store.resolve("a").number == 1


def test_content_of_a_comparison_that_is_stored_again_is_a_version_of_its_own(store, make_bundle) -> None:
    store.put("a", make_bundle(b"1"), comparison=COMPARISON)
    again = store.put("a", make_bundle(b"1"))
    assert (again.number, again.comparison) == (1, None)
    assert store.put("a", make_bundle(b"1"), comparison=COMPARISON).comparison is None
    assert store.resolve("a").number == 1


def test_a_list_has_a_line_for_the_versions_of_a_comparison(store, make_bundle) -> None:
    store.put("a", make_bundle(b"own"))
    for i in range(3):
        store.put("a", make_bundle(b"%d" % i), comparison=COMPARISON)
    store.put("b", make_bundle(b"1"), comparison="controls/b-0123456789")
    store.promote("a@3", "candidate")
    own, compared = fold_comparisons(store.list())
    assert [str(each) for each in own] == ["a@1", "a@3"]
    assert [str(each) for each in compared] == ["a@2 to @4", "b@1"]
    assert compared[0].as_json()["versions"] == 2


def test_what_is_not_there_is_said_with_what_is(store, make_bundle) -> None:
    with pytest.raises(NotFound, match="there is no store at"):
        store.resolve("a")
    store.put("a", make_bundle(b"1"))
    store.put("a", make_bundle(b"2"))
    with pytest.raises(NotFound, match="no adapter named 'b': the store has a"):
        store.resolve("b")
    with pytest.raises(NotFound, match="no a@7: a has versions 1 to 2 and no alias"):
        store.resolve("a@7")
    with pytest.raises(NotFound, match="no a@production"):
        store.files("a@production")
    with pytest.raises(BadReference):
        store.resolve("../a")


def test_reading_makes_nothing_on_disk(store) -> None:
    assert list(store.list()) == []
    assert store.unfinished_run("x", "y") is None
    assert not store.root.exists()


def test_a_flipped_bit_in_any_file_is_found_and_never_handed_on(store, make_bundle, tmp_path) -> None:
    store.put("a", make_bundle(os.urandom(50_000)))
    for name in store.files("a"):
        good = by_hand.read(store, "a", name)
        by_hand.write(store, "a", name, good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(Corrupt, match="does not match its digest"):
            store.files("a")
        out = tmp_path / f"out-{name}"
        with pytest.raises(Corrupt, match="restore it from a copy"):
            store.materialize("a", out)
        assert not (out / name).exists()
        by_hand.write(store, "a", name, good)
    store.files("a")


def test_a_stored_file_that_is_gone_is_said(store, make_bundle, tmp_path) -> None:
    store.put("a", make_bundle())
    by_hand.remove(store, "a", "adapter_model.safetensors")
    with pytest.raises(Corrupt, match="is missing"):
        store.files("a")
    with pytest.raises(Corrupt, match="is missing"):
        store.materialize("a", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"012345678x", b"0123", None])
@pytest.mark.parametrize("name", ["a", "b"])
def test_storing_damaged_content_again_mends_it(store, make_bundle, name, damage) -> None:
    """Changed, cut or missing; also if the version exists already, and it keeps its number."""
    bundle = make_bundle(b"0123456789")
    store.put("a", bundle)
    if damage is None:
        by_hand.remove(store, "a", "adapter_model.safetensors")
    else:
        by_hand.write(store, "a", "adapter_model.safetensors", damage)
    with pytest.raises(Corrupt):
        store.files("a")
    assert store.put(name, bundle).number == 1
    assert store.files("a")["adapter_model.safetensors"].read_bytes() == b"0123456789"


def test_show_tells_all_that_is_known(store, make_bundle) -> None:
    run = store.new_run("a", "name = 'a'\n", "sha256:data")
    store.put("a", make_bundle(), run=run.id, metrics={"test": {"loss": float("nan")}})
    store.end_run(run, "finished", result={"version": "a@1"})
    shown = store.show("a")
    json.dumps(shown, allow_nan=False)
    assert shown["version"] == "a@1"
    assert shown["metrics"] == {"test": {"loss": None}}
    assert set(shown["files"]) == {"manifest.json", "adapter_config.json", "adapter_model.safetensors"}
    assert shown["manifest"]["base"] == {"id": "tiny"}
    assert shown["run"]["state"] == "finished"
    assert shown["run"]["result"] == {"version": "a@1"}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda b: (b / "manifest.json").unlink(), "is not a bundle"),
        (lambda b: (b / "manifest.json").write_text("{"), "is not JSON"),
        (lambda b: (b / "manifest.json").write_text("[" * 100_000), "is not JSON"),
        (lambda b: (b / "manifest.json").write_text("[]"), "lacks 'digest'"),
        (lambda b: (b / "manifest.json").write_text('{"digest": "sha256:x"}'), "lacks 'digest' or 'files'"),
        (lambda b: (b / "manifest.json").write_text('{"digest": "x", "files": ["a"]}'), "lacks 'digest' or 'files'"),
        (lambda b: (b / "manifest.json").write_text('{"digest": "x", "files": {"a": 1}}'), "lacks 'digest' or 'files'"),
        (lambda b: (b / "adapter_config.json").unlink(), "names 'adapter_config.json': No such file"),
        (lambda b: (b / "adapter_config.json").write_text("{} "), "the bundle was changed"),
        (lambda b: _link(b / "adapter_config.json"), "is not a regular file"),
        (lambda b: _name(b, "../secret"), "expected relative paths"),
        (lambda b: _name(b, "/etc/passwd"), "expected relative paths"),
        (lambda b: _name(b, "a\\b"), "expected relative paths"),
        (lambda b: _name(b, "a/./b"), "expected relative paths"),
    ],
)
def test_a_broken_bundle_is_refused_and_leaves_no_version(store, make_bundle, spoil, complaint) -> None:
    bundle = make_bundle()
    spoil(bundle)
    with pytest.raises(BundleError, match=complaint):
        store.put("a", bundle)
    assert list(store.list()) == []


@pytest.mark.parametrize("name", ["..", "a/b", "-x", "", "A", "a\0"])
def test_a_bad_name_is_refused_before_anything_is_written(store, make_bundle, name) -> None:
    with pytest.raises(BadReference):
        store.put(name, make_bundle())
    assert not store.root.exists()


def test_a_store_that_is_a_file_or_no_database_is_said(tmp_path, make_bundle) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="expected a folder"):
        Store(tmp_path / "file").put("a", make_bundle())
    (tmp_path / "turret.db").write_bytes(b"not sqlite" * 1000)
    with pytest.raises(StoreError, match="is not a turret store or is damaged"):
        Store(tmp_path).list()


def _point(store: Store, alias: str, number: int) -> None:
    """Set an alias by hand."""
    with store.database(make=True).writing() as connection:
        row = connection.execute(select(db.versions).where(db.versions.c.number == number)).one()
        point = {"adapter_id": row.adapter_id, "alias": alias, "version_id": row.id, "moved": "now"}
        connection.execute(insert(db.aliases).values(point))


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def _name(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
