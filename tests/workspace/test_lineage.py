"""The lineage of a version is stored, shown and compared, and a parent version is not deleted while it is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small_models
import tiny_training
import torch
from safetensors.torch import load_file

from turret import LoRA, Recipe, Workspace, adapters, bases, bundles
from turret.cli.main import run
from turret.errors import AdapterError, InUse, NotFound
from turret.workspace import RunResult


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A base, a table, and the bundle of a random LoRA."""
    folder = tmp_path_factory.mktemp("lineage")
    small_models.save_base("bert", folder / "bert")
    rows = [f"{each.text},{each.label}\n" for each in tiny_training.labelled(24)]
    (folder / "tone.csv").write_text("text,label\n" + "".join(rows))
    base = bases.load(str(folder / "bert"), task="classify", num_labels=2)
    spec = tiny_training.task_of(tiny_training.recipe(), tiny_training.dataset(), base).spec()
    adapters.attach(base.model, LoRA(init_lora_weights=False), generator=torch.Generator().manual_seed(0))
    tensors, head, method = adapters.extract(base.model)
    info = adapters.BaseInfo(base.id, base.fingerprint, base.family.name)
    bundles.save_bundle(adapters.Adapter(method, tensors, head, info, spec), folder / "parent")
    return folder


def recipe(folder: Path, **train: object) -> Recipe:
    return Recipe(
        name="tone",
        base=str(folder / "bert"),
        data={"source": str(folder / "tone.csv"), "test": 8},
        train={"epochs": 1, "evaluate": "never", "init_from": "tone@production", **train},
    )


@pytest.fixture(scope="session")
def trained(folder) -> tuple[Workspace, RunResult]:
    """`tone@2`, trained from `tone@production` while that alias named `tone@1`."""
    workspace = Workspace(folder / "store")
    workspace.store.put("tone", folder / "parent")
    workspace.promote("tone@1", "production")
    return workspace, workspace.train(recipe(folder))


def test_the_parent_is_the_version_that_was_gone_on_from_by_its_digest(trained) -> None:
    workspace, result = trained
    lineage = workspace.show(result.version)["manifest"]["lineage"]
    assert lineage["parent"] == workspace.resolve("tone@1").digest
    assert any("starts from tone@1" in note for note in result.notes)
    kept = Recipe.load(workspace.store.root / "runs" / result.run / "recipe.toml")
    assert kept.train.init_from == "tone@1"


def test_what_another_version_was_made_from_is_kept(trained) -> None:
    workspace, result = trained
    workspace.promote(result.version, "production")
    with pytest.raises(InUse, match=f"tone@1 is not deleted: {result.version} was made from it"):
        workspace.delete("tone@1")


def test_show_prints_what_it_was_made_from_and_diff_compares_it(trained, capsys, monkeypatch) -> None:
    workspace, result = trained
    parent = workspace.resolve("tone@1").digest
    assert run(["show", result.version, "--store", str(workspace.store.root)]) == 0
    out = capsys.readouterr().out
    for said in ("parent", parent[:19], "data", "tokenizer", "seed", "torch " + torch.__version__, "turret ", " by "):
        assert said in out, said
    shown = workspace.show(result.version)
    assert shown["who"]
    assert all(move["who"] for move in shown["alias_history"])
    assert run(["diff", "tone@1", result.version, "--store", str(workspace.store.root), "--json"]) == 0
    differs = json.loads(capsys.readouterr().out)["differs"]
    assert differs["lineage.parent"] == [None, parent]
    assert "lineage.libraries.torch" in differs
    assert "lineage.recipe.train.init_from" in differs


@pytest.mark.slow
def test_plan_reads_the_version_too_and_what_is_not_there_or_does_not_fit_is_said_before_anything_is_loaded(
    trained, folder
) -> None:
    workspace, _ = trained
    stages: list[str] = []
    with pytest.raises(NotFound, match="no tone@9"):
        workspace.plan(recipe(folder, init_from="tone@9"), on_stage=stages.append)
    with pytest.raises(NotFound, match="there is no store at"):
        Workspace(folder / "none").train(recipe(folder), on_stage=stages.append)
    assert not any(words.startswith("loading") for words in stages)
    assert not (folder / "none").exists()
    planned = workspace.plan(recipe(folder, init_from="tone@1"))
    assert any("starts from tone@1" in note for note in planned.notes)
    with pytest.raises(AdapterError, match="training cannot start from tone@1: it has r 8"):
        workspace.plan(recipe(folder, init_from="tone@1").with_overrides({"method.r": "4"}))


@pytest.mark.slow
def test_processes_that_train_together_go_on_from_a_version_as_one_does(trained, folder, tmp_path) -> None:
    """Both processes read the parent version, one stores the result. If it is missing, both end and one reports it."""
    small_models.save_base("bert", tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    still = {"base": str(tmp_path / "bert"), "method.lora_dropout": "0", "train.dtype": "float32"}
    made = recipe(folder, init_from="tone@1").with_overrides(still)
    (tmp_path / "tone.toml").write_text(made.to_toml())
    for name in ("alone", "together"):
        Workspace(tmp_path / name).store.put("tone", folder / "parent")
    Workspace(tmp_path / "alone").train(made)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "turret"]
    command = [*launch, "train", str(tmp_path / "tone.toml"), "--json", "--store"]
    done = subprocess.run([*command, str(tmp_path / "together")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == "tone@2"
    assert [str(each) for each in Workspace(tmp_path / "together").list()] == ["tone@1", "tone@2"]
    lineages = [Workspace(tmp_path / n).show("tone@2")["manifest"]["lineage"] for n in ("alone", "together")]
    assert lineages[0]["parent"] == lineages[1]["parent"] == trained[0].resolve("tone@1").digest
    start, alone, together = (
        load_file(Workspace(tmp_path / name).store.files(version)["adapter_model.safetensors"])
        for name, version in (("alone", "tone@1"), ("alone", "tone@2"), ("together", "tone@2"))
    )
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-5
    assert max(float((alone[name] - start[name]).abs().max()) for name in start) > 1e-4
    done = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert len(re.findall(r"^turret: no tone@1: there is no store at", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert done.stderr.count("turret: ") == 1


@pytest.mark.slow
def test_repeated_in_another_store_it_is_the_same_version_whoever_does_it(
    trained, folder, tmp_path, monkeypatch
) -> None:
    workspace, result = trained
    monkeypatch.setenv("TURRET_USER", "somebody else")
    other = Workspace(tmp_path / "store")
    other.store.put("tone", folder / "parent")
    again = other.train(Recipe.load(workspace.store.root / "runs" / result.run / "recipe.toml"))
    assert again.digest == result.digest
    assert other.resolve(again.version).who == "somebody else" != workspace.resolve(result.version).who
