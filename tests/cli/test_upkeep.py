"""`verify`, `gc`, `delete`, `diff`: lines of text, or one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from store.bundles import tensors, write_bundle

from turret.cli.main import run
from turret.store import Store


@pytest.fixture
def stored(tmp_path) -> str:
    store = Store(tmp_path / "store")
    for seed, rate in enumerate((0.001, 0.003)):
        said = {"lineage": {"data": "sha256:d", "recipe": f"[train]\nlr = {rate}\n"}}
        metrics = {"test": {"accuracy": 0.5 + seed / 4, "per_class": {"tech": {"f1": 0.5}}}}
        store.put("news", write_bundle(tmp_path, tensors(seed), said=said), metrics=metrics)
    return str(store.root)


def spoiled(stored: str) -> Path:
    path = Store(stored).files("news@1")["adapter_model.safetensors"]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    return path


def test_verify_of_a_whole_store(stored, capsys) -> None:
    assert run(["verify", "--store", stored]) == 0
    assert "no problem: 2 versions, 6 files" in capsys.readouterr().out
    assert run(["verify", "--store", stored, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    assert set(said) == {"store", "ok", "versions", "files", "bytes", "problems", "orphans", "orphan_bytes"}


def test_verify_of_a_damaged_store_is_a_line_a_problem_and_status_1(stored, capsys) -> None:
    path = spoiled(stored)
    assert run(["verify", "--store", stored]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("news@1 adapter_model.safetensors: ")
    assert path.name in first
    assert last.startswith("broken: 1")
    assert run(["verify", "--store", stored, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert set(said["problems"][0]) == {"where", "path", "problem"}
    assert run(["verify", "news@2", "--store", stored]) == 0
    assert run(["promote", "news@1", "production", "--store", stored]) == 1
    assert run(["verify", "--store", stored + "-not"]) == 1
    assert "there is no store at" in capsys.readouterr().err


def test_delete_then_gc_frees_the_files(stored, capsys) -> None:
    assert run(["delete", "news@2", "--store", stored]) == 0
    assert "deleted news@2" in capsys.readouterr().out
    assert run(["verify", "--store", stored]) == 0
    assert "2 files" in capsys.readouterr().out
    assert run(["gc", "--dry-run", "--store", stored]) == 0
    dry = capsys.readouterr().out.splitlines()
    assert dry[-1].startswith("2 would be removed, ")
    assert run(["gc", "--store", stored, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"store", "dry_run", "bytes", "removed"}
    assert [set(each) for each in said["removed"]] == [{"path", "bytes", "why"}] * 2
    assert said["bytes"] == sum(each["bytes"] for each in said["removed"])
    assert all(each["path"] in " ".join(dry) for each in said["removed"])
    assert run(["gc", "--store", stored]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"


def test_delete_refuses_what_is_in_use_unless_forced(stored, capsys) -> None:
    run(["promote", "news@2", "production", "--store", stored])
    capsys.readouterr()
    assert run(["delete", "news@2", "--store", stored]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "news@2 is not deleted: news@production names it" in err
    assert run(["delete", "news@2", "--force", "--store", stored, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["aliases"] == ["production"]
    assert set(said) == {"version", "digest", "aliases", "bytes"}
    assert run(["delete", "news", "--store", stored]) == 2


def test_diff_for_people(stored, capsys) -> None:
    assert run(["diff", "news@1", "news@2", "--store", stored]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert ["lineage.recipe.train.lr", "0.001", "0.003"] in lines
    assert ["test", "accuracy", "0.500", "0.750", "+0.250"] in lines
    assert any(line[0] == "all" for line in lines)
    assert "per_class" not in out


def test_diff_json_has_stable_keys(stored, capsys) -> None:
    assert run(["diff", "news@1", "news@2", "--store", stored, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"versions", "differs", "metrics", "bytes", "weights", "moved", "not_compared"}
    assert said["differs"] == {"lineage.recipe.train.lr": [0.001, 0.003]}
    assert said["metrics"]["test"]["accuracy"] == {"a": 0.5, "b": 0.75, "difference": 0.25}
    assert set(said["moved"]) == {"group", "tensors", "norm", "distance"}
    assert run(["diff", "news@1", "news@7", "--store", stored]) == 1
