"""A store folder from another user is read, or refused with one line, and nothing outside it is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from store import by_hand

from turret.cli.main import run
from turret.errors import BadReference, Corrupt, StoreError
from turret.store import Store
from turret.store.golden import Example, GoldenSet, digest_of
from turret.workspace import Workspace

FILES = "s3"  # of a store by URL
READS = [["list"], ["show", "a@1"], ["diff", "a@1", "a@2"], ["verify"], ["gate", "a"], ["gc", "--dry-run"]]


def blob(store: Store) -> Path:
    path = store.files("a@1")["adapter_model.safetensors"]
    path.chmod(0o644)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    ["../outside", "/tmp/outside", "a/../../outside", "..\\outside", "C:outside", "a\0b", "", ".", "a\nb", "./a"],
)
def test_a_path_that_leaves_the_bundle_is_never_written_to(where, store, put, tmp_path, path) -> None:
    if "\0" in path and store.location.catalog is not None:
        pytest.skip("PostgreSQL holds no NUL")
    put(), put()
    by_hand.execute(store, "UPDATE files SET path = ? WHERE path = 'adapter_config.json' AND version_id = 1", path)
    before = sorted(tmp_path.rglob("*"))
    for call in (
        lambda: store.materialize("a@1", tmp_path / "deep" / "out"),
        lambda: store.files("a@1"),
        lambda: store.promote("a@1", "production"),
        lambda: Workspace(where).export("a@1", tmp_path / "exported"),
        lambda: Workspace(where).predict("a@1", ["x"]),
    ):
        with pytest.raises(Corrupt, match="which is not a path inside a bundle: delete the version") as refused:
            call()
        assert str(refused.value).isprintable()
    scratch = store.root / "scratch"  # of an export, empty again
    made = {scratch, *scratch.parents} - set(before)
    after = [each for each in sorted(tmp_path.rglob("*")) if "turret.db-" not in each.name and each not in made]
    assert after == before
    assert list(scratch.iterdir()) == []
    (problem,) = store.verify().problems
    assert problem.where == "a@1"
    assert store.materialize("a@2", tmp_path / "fine").number == 2
    store.delete("a@1")
    assert store.verify().ok


@pytest.mark.parametrize("make", [os.symlink, os.link, lambda _target, path: os.mkfifo(path), lambda _, p: p.mkdir()])
def test_a_stored_file_that_is_a_link_a_pipe_or_a_folder_is_not_read(folder_store, put, tmp_path, make) -> None:
    """A hard link to other bytes is damage; reading a pipe would block."""
    put()
    path = blob(folder_store)
    (tmp_path / "secret").write_bytes(path.read_bytes()[::-1])
    path.unlink()
    make(tmp_path / "secret", path)
    with pytest.raises((Corrupt, StoreError)):
        folder_store.materialize("a@1", tmp_path / "out")
    with pytest.raises((Corrupt, StoreError)):
        folder_store.files("a@1")
    assert not folder_store.verify().ok
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_link_is_not_followed_even_to_the_right_bytes(folder_store, put, tmp_path) -> None:
    put()
    path = blob(folder_store)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="is not a regular file"):
        folder_store.files("a@1")


@pytest.mark.parametrize("column", ["manifest", "metrics"])
@pytest.mark.parametrize("value", ["{", "", "[" * 50_000, "nonsense"])
def test_a_row_that_is_no_json_is_one_line(folder_store, put, capsys, column, value) -> None:
    """Only SQLite: PostgreSQL accepts no such row."""
    put(), put()
    by_hand.execute(folder_store, f"UPDATE versions SET {column} = ? WHERE id = 1", value)
    for arguments in (["list"], ["show", "a@1"], ["promote", "a@1", "x"]):
        assert run([*arguments, "--store", str(folder_store.root)]) == 1
        err = capsys.readouterr().err
        assert "restore it from a copy" in err, arguments
        assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "said",
    [
        {"base": "x", "method": [1], "task": 7, "lineage": "y"},
        {"base": {"id": [1]}, "method": {"kind": {}}, "task": {"kind": None, "labels": [1, None]}},
        {"lineage": {"libraries": [1], "recipe": 7, "parent": {"a": 1}, "imported": [], "seed": {}}},
        [],
        {"base": {"id": "\x1b[2J", "fingerprint": 3, "revision": {}}, "method": {"kind": "\x1b[31m", "\x07": "\x1b"}},
    ],
)
def test_a_manifest_of_another_shape_is_shown_as_far_as_it_goes_and_moves_no_cursor(
    where, store, put, capsys, said
) -> None:
    put(), put()
    by_hand.execute(store, "UPDATE versions SET manifest = ?", json.dumps(said))
    by_hand.execute(
        store, "UPDATE versions SET metrics = ?", json.dumps([[1], {"test": 7, "x": {"loss": "\x1b"}}][len(said) % 2])
    )
    for arguments in READS:
        status = run([*arguments, "--store", where])
        out, err = capsys.readouterr()
        assert "bug in turret" not in err, (arguments, err)
        assert (status, err) == (int(arguments == ["verify"]), "") or err.count("\n") == 1
        assert out.replace("\n", "").isprintable()
        assert run([*arguments, "--json", "--store", where]) in (0, 1)
        out, err = capsys.readouterr()
        assert "bug in turret" not in err, (arguments, err)
        json.loads(out or "{}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", ["", "{", "[]\n", '{"text": 1}\n', '{"label": "x"}\n', '{"text": "a", "label": "b"}\n{"text": "a"}\n']
)
def test_golden_examples_that_make_no_sense_and_have_the_right_digest_are_one_line(store, put, content) -> None:
    put(said={"task": {"kind": "classify", "labels": ["b"]}})
    store.gate("a", "production", examples=GoldenSet((Example("a", "label", "b"),)))
    digest = digest_of(content)
    by_hand.execute(store, "UPDATE golden_sets SET digest = ?, content = ?", digest, content)
    by_hand.execute(store, "UPDATE golden_gates SET golden = ?", digest)
    with pytest.raises(Corrupt, match=r"golden examples golden:\w+ cannot be read"):
        store.promote("a", "production")
    with pytest.raises(Corrupt, match="cannot be read"):
        store.examples(digest)


@pytest.mark.parametrize("name", ["../x", "A", "\x1b[2J", "%2e%2e"])
def test_a_name_that_no_store_of_ours_gives_is_printed_plainly_and_cannot_be_asked_for(
    where, store, put, capsys, tmp_path, name
) -> None:
    put()
    by_hand.execute(store, "UPDATE adapters SET name = ?", name)
    assert run(["list", "--store", where]) == 0
    assert capsys.readouterr().out.replace("\n", "").isprintable()
    with pytest.raises(BadReference):
        store.materialize(f"{name}@1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
