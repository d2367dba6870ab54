"""`list` and `show`: tables for people, one object for machines."""

from __future__ import annotations

import json

import pytest
from store.bundles import write_bundle

from turret.cli.main import run
from turret.store import Store


@pytest.fixture
def stored(tmp_path) -> str:
    store = Store(tmp_path / "store")
    report = {"tech": {"precision": 1.0, "recall": 0.5, "f1": 0.667, "support": 4}}
    for accuracy in (0.5, 0.953):
        bundle = write_bundle(tmp_path, b"%f" % accuracy)
        metrics = {"test": {"accuracy": accuracy, "loss": 0.18, "per_class": report}}
        store.put("news", bundle, run="20260101-000000-abcdef", metrics=metrics)
    return str(store.root)


def test_list_is_a_line_a_version(stored, capsys) -> None:
    assert run(["list", "--store", stored]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["version", "alias", "method", "base", "metric", "size", "age"]
    assert first.split()[:5] == ["news@1", "lora", "tiny", "accuracy", "0.500"]
    assert "news@2" in second
    assert "accuracy 0.953" in second


def test_list_of_one_name_leaves_the_others_out(stored, capsys) -> None:
    assert run(["list", "other", "--store", stored]) == 0
    assert "nothing stored" in capsys.readouterr().out


def test_list_json_is_one_object_with_stable_keys(stored, capsys) -> None:
    assert run(["list", "--store", stored, "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert err == ""
    assert out.count("\n") == 1
    assert set(said) == {"store", "versions"}
    assert [version["version"] for version in said["versions"]] == ["news@1", "news@2"]
    assert set(said["versions"][0]) == {
        "version", "digest", "created", "who", "aliases", "base", "method", "task", "metrics", "bytes", "run",
    }  # fmt: skip


def test_an_empty_store_lists_nothing_and_is_not_made(tmp_path, capsys) -> None:
    assert run(["list", "--store", str(tmp_path / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"] == []
    assert run(["list", "--store", str(tmp_path / "none")]) == 0
    assert "turret train" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_show_tells_metrics_files_and_classes(stored, capsys) -> None:
    assert run(["show", "news", "--store", stored]) == 0
    out = capsys.readouterr().out
    for said in ("news@2", "sha256:", "tiny", "accuracy 0.953", "adapter_model.safetensors", "tech", "0.667"):
        assert said in out


def test_show_json_is_the_whole_version(stored, capsys) -> None:
    assert run(["show", "news@1", "--store", stored, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["version"] == "news@1"
    assert set(said) == {
        "version", "digest", "created", "who", "aliases", "bytes", "metrics", "files", "manifest", "alias_history",
        "replays", "run",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "status", "complaint"),
    [
        ("other", 1, "no adapter named 'other': the store has news"),
        ("news@9", 1, "no news@9: news has versions 1 to 2"),
        ("news@production", 1, "no news@production"),
        ("../news", 2, "bad adapter name"),
        ("news@0", 2, "bad reference"),
    ],
)
def test_a_reference_that_is_not_there_or_bad_is_one_line(stored, reference, status, complaint, capsys) -> None:
    assert run(["show", reference, "--store", stored]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1


def test_a_store_that_is_not_one_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "turret.db").write_bytes(b"something else" * 999)
    assert run(["list", "--store", str(tmp_path)]) == 1
    assert "is not a turret store or is damaged" in capsys.readouterr().err
