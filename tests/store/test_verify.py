"""`verify` finds every change of every file and row, and reports nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from store import by_hand
from store.bundles import safetensors, write_bundle

from turret.errors import NotFound
from turret.store import Store
from turret.store.blobs import hash_file
from turret.store.upkeep import Damage, Verified

FILES = "s3"  # of a store by URL


def problems(store: Store, reference: str | None = None) -> list[str]:
    return [str(problem) for problem in store.verify(reference).problems]


def test_a_whole_store_verifies(store, put) -> None:
    put(), put("b")
    store.promote("a@1", "production")
    found = store.verify()
    assert found.ok
    assert (found.versions, found.files, found.orphans) == (2, 6, 0)
    assert json.loads(json.dumps(found.as_json()))["ok"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_a_flipped_bit_in_any_file_is_found_and_named(store, put, name) -> None:
    put(), put()
    good = by_hand.read(store, "a@2", name)
    for place in {0, len(good) // 2, len(good) - 1}:
        by_hand.write(store, "a@2", name, good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert any(said.startswith(f"a@2 {name}: stored file") for said in problems(store)), place
        assert problems(store, "a@2")
    by_hand.write(store, "a@2", name, good)
    assert store.verify().ok


def test_a_file_that_is_missing_or_cut_is_found(store, put) -> None:
    put(), put()
    name = "adapter_model.safetensors"
    by_hand.remove(store, "a@1", name)
    by_hand.write(store, "a@2", name, by_hand.read(store, "a@2", name)[:-1])
    one, two = problems(store)
    assert one.startswith("a@1 adapter_model.safetensors: stored file sha256:")
    assert "is missing" in one
    assert two.startswith("a@2 adapter_model.safetensors: stored file")
    assert "does not match its digest" in two
    assert len(problems(store, "a@1")) == 1


def test_a_file_that_never_was_safetensors_is_found(store, make_bundle) -> None:
    store.put("a", make_bundle(b"tensors"))
    store.put("b", make_bundle(safetensors({})))
    one, two = problems(store)
    assert "a@1 adapter_model.safetensors: is not a readable safetensors file" in one
    assert "b@1 adapter_model.safetensors: has no tensors" in two


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE versions SET digest = 'sha256:0000'", "a@1 manifest.json: has digest"),
        ("UPDATE versions SET digest = 'sha256:zzzz'", "a@1 manifest.json: has digest"),
        ('UPDATE versions SET manifest = \'{"digest": "x"}\'', "a@1 manifest.json: differs from the listed manifest"),
        ("DELETE FROM files WHERE path = 'manifest.json'", "a@1 manifest.json: is not listed"),
        ("DELETE FROM files WHERE path = 'adapter_config.json'", "a@1 manifest.json: names other files"),
        ("UPDATE files SET bytes = 1 WHERE path = 'manifest.json'", "a@1 manifest.json: has "),
        ("UPDATE aliases SET version_id = 77", "a@production: names a version that is not listed"),
        (  # of another adapter
            "UPDATE aliases SET version_id = (SELECT max(id) FROM versions)",
            "a@production: names a version that is not listed",
        ),
    ],
)
def test_rows_that_do_not_agree_with_the_files_are_found(store, put, make_bundle, statement, said) -> None:
    put()
    store.promote("a@1", "production")
    store.put("other", make_bundle())
    by_hand.execute(store, statement)
    assert any(problem.startswith(said) for problem in problems(store)), problems(store)


def test_files_that_no_version_lists_are_counted_and_no_problem(store, put, tmp_path) -> None:
    put(), put()
    store.delete("a@1")
    found = store.verify()
    assert found.ok
    assert found.orphans == 2  # the other version has the same configuration
    assert found.orphan_bytes > 0


def test_one_version_is_looked_at_alone_and_one_that_is_not_there_is_said(store, put, tmp_path) -> None:
    put(), put()
    by_hand.remove(store, "a@1", "manifest.json")
    assert store.verify("a@2").ok
    assert not store.verify("a@1").ok
    with pytest.raises(NotFound, match="no a@7"):
        store.verify("a@7")
    with pytest.raises(NotFound, match="nothing to read: there is no store at"):
        Store(tmp_path / "none").verify()


def test_the_result_of_two_tenants_has_the_sums_and_the_problems_of_both() -> None:
    own = Verified(1, 3, 100, (Damage("a@1", "x", "is missing"),), 2, 20)
    both = own.and_of("acme", Verified(2, 6, 300, (Damage("b@1", None, "is gone"),), 0, 0))
    assert (both.versions, both.files, both.bytes, both.orphans, both.orphan_bytes) == (3, 9, 400, 2, 20)
    assert [str(problem) for problem in both.problems] == ["a@1 x: is missing", "acme/b@1: is gone"]


def test_a_manifest_that_changed_with_its_digest_is_found(store, tmp_path) -> None:
    """The file and its row in `files` were replaced; the row of the version still differs."""
    bundle = write_bundle(tmp_path, safetensors({"a": [1.0]}))
    store.put("a", bundle)
    other = json.loads((bundle / "manifest.json").read_text())
    other["base"] = {"id": "another"}
    (bundle / "manifest.json").write_text(json.dumps(other))
    blob = replace(hash_file(bundle / "manifest.json"), upload=by_hand.copy(store, "a", "manifest.json").upload)
    store._blobs.put(bundle / "manifest.json", blob)
    change = f"UPDATE files SET digest = '{blob.digest}', bytes = {blob.bytes} WHERE path = 'manifest.json'"
    by_hand.execute(store, change)
    assert problems(store) == ["a@1 manifest.json: differs from the listed manifest"]
