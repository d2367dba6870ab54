"""`list` and `show`: tables, or one JSON object."""

from __future__ import annotations

import json

import pytest
from store.bundles import write_bundle

from turret.cli.main import run
from turret.recipe import Recipe
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
    assert capsys.readouterr().out.startswith(f"no version of other in {stored} yet: turret train")
    assert run(["list", "news@1", "--store", stored]) == 2
    assert capsys.readouterr().err.startswith("turret: bad adapter name 'news@1': expected")


@pytest.mark.slow
def test_a_list_of_many_shows_the_newest_of_each_name_and_those_with_an_alias(stored, tmp_path, capsys) -> None:
    """Up to 40 versions are all shown; `list NAME` and --json always show all."""
    store = Store(stored)
    for number in range(38):
        store.put("one", write_bundle(tmp_path, b"%d" % number))
    assert run(["list", "--store", stored]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 40
    store.put("one", write_bundle(tmp_path, b"the 41st"))
    store.promote("one@3", "production")
    assert run(["list", "--store", stored]) == 0
    _, *rows, more = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["news@2", "one@3", "one@39"]
    assert more == "38 earlier versions without an alias: turret list NAME, or --json"
    assert run(["list", "one", "--store", stored]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 39
    assert run(["list", "--json", "--store", stored]) == 0
    assert len(json.loads(capsys.readouterr().out)["versions"]) == 41


def test_show_recipe_prints_what_train_takes(tmp_path, capsys) -> None:
    made = Recipe(name="a", base="tiny", data={"source": "a [b].csv"})
    store = Store(tmp_path / "store")
    store.put("a", write_bundle(tmp_path, b"1", said={"lineage": {"recipe": made.to_toml()}}))
    store.put("imported", write_bundle(tmp_path, b"2"))
    assert run(["show", "a", "--recipe", "--store", str(store.root)]) == 0
    (tmp_path / "again.toml").write_text(capsys.readouterr().out)
    assert Recipe.load(tmp_path / "again.toml") == made
    assert run(["show", "a", "--recipe", "--json", "--store", str(store.root)]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": "a@1", "recipe": made.to_toml()}
    assert run(["show", "imported", "--recipe", "--store", str(store.root)]) == 1
    assert "imported@1 has no recipe" in capsys.readouterr().err


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
        "comparison",
    }  # fmt: skip


def test_the_trainings_of_a_comparison_are_one_line(stored, tmp_path, capsys) -> None:
    store = Store(stored)
    for number in range(3):
        store.put("news", write_bundle(tmp_path, b"%d" % number), comparison="comparisons/news-0123456789")
    assert run(["list", "--store", stored]) == 0
    _, _, second, folded = capsys.readouterr().out.splitlines()
    assert second.startswith("news@2 ")
    assert folded.startswith("news@3 to @5 ")
    assert "3 trainings of a comparison" in folded
    assert run(["list", "news", "--all", "--store", stored]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 5
    assert run(["list", "--json", "--store", stored]) == 0
    found = {each["version"]: each["comparison"] for each in json.loads(capsys.readouterr().out)["versions"]}
    assert (found["news@2"], found["news@5"]) == (None, "comparisons/news-0123456789")
    assert run(["show", "news", "--store", stored]) == 0
    assert "news@2" in capsys.readouterr().out
    assert run(["show", "news@4", "--store", stored]) == 0
    assert "turret promote news@4 production keeps it" in capsys.readouterr().out


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
        "replays", "run", "comparison", "promise",
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
