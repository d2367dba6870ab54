"""`turret merge`: what comes out is what PEFT merges, and what cannot be merged is refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import small_models
import torch
import typer.main
from exchange.foreign import CONFIG, LABELS, TEXTS, WEIGHTS, chances, peft_folder
from safetensors.torch import load_file, save_file
from small_disk import read_only

from turret.adapters.tuners.lora import COMBINATIONS
from turret.cli.main import app, run
from turret.errors import AdapterError, RecipeError
from turret.workspace import Workspace
from turret.workspace.merging import _mean

CHANGED = {"modules_to_save": None, "task_type": None, "init_lora_weights": True}  # dare draws behind the same start


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> tuple[Workspace, list[Path]]:
    """A store with `a@1` and `b@1`, LoRAs of one rank by PEFT, and their folders."""
    root = tmp_path_factory.mktemp("merge")
    made = Workspace(root / "store")
    folders = []
    for seed, name in enumerate(("a", "b"), 3):
        folders.append(peft_folder("bert", "classify", root / name, seed=seed))
        made.import_adapter(folders[-1], name, base=str(bert), labels=LABELS)
    return made, folders


def merged_by_peft(folders: list[Path], how: str, weights: list[float], tmp_path: Path) -> peft.PeftModel:
    """PEFT's own: the two folders loaded by PEFT and merged by it. The heads, which it does not merge, are averaged."""
    bare, heads = [], []
    for folder in folders:
        config = json.loads((folder / CONFIG).read_text()) | CHANGED
        tensors = load_file(folder / WEIGHTS)
        bare.append(tmp_path / folder.name)
        bare[-1].mkdir()
        (bare[-1] / CONFIG).write_text(json.dumps(config))
        save_file({name: each for name, each in tensors.items() if ".lora_" in name}, bare[-1] / WEIGHTS)
        heads.append({name.rpartition(".")[2]: each for name, each in tensors.items() if ".lora_" not in name})
    model = peft.PeftModel.from_pretrained(small_models.build("bert", "classify"), str(bare[0]), adapter_name="a")
    model.load_adapter(str(bare[1]), adapter_name="b")
    kind, prunes = COMBINATIONS[how]
    torch.manual_seed(42)
    model.base_model.add_weighted_adapter(
        ["a", "b"], weights, "merged", combination_type=kind, density=0.5 if prunes else None
    )
    model.set_adapter("merged")
    for name, value in model.base_model.model.classifier.named_parameters():
        value.copy_(sum(weight * head[name] for weight, head in zip(weights, heads, strict=True)) / sum(weights))
    return model.eval()


def test_the_help_names_every_way_to_merge() -> None:
    option = next(each for each in typer.main.get_command(app).commands["merge"].params if each.name == "how")
    assert option.help == ", ".join(COMBINATIONS) + "."


@pytest.mark.parametrize("how", COMBINATIONS)
@torch.no_grad()
def test_a_merged_version_answers_as_pefts(two: tuple[Workspace, list[Path]], how: str, tmp_path: Path) -> None:
    workspace, folders = two
    found = workspace.merge(["a@1", "b@1"], f"by-{how}", how=how, weights=[0.7, 0.3])
    theirs, tokenizer = merged_by_peft(folders, how, [0.7, 0.3], tmp_path), small_models.tokenizer("bert")
    for text in TEXTS:
        expected = theirs(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.softmax(-1)[0]
        torch.testing.assert_close(chances(workspace, found.version, text), expected, atol=1e-5, rtol=1e-5)
    alone = chances(workspace, "a@1", TEXTS[0])
    assert (chances(workspace, found.version, TEXTS[0]) - alone).abs().max() > 1e-3


def test_a_merge_in_a_read_only_store_is_one_line(two: tuple[Workspace, list[Path]], capsys) -> None:
    workspace, _ = two
    merge = ["merge", "a@1", "b@1", "--name", "refused", "--store", str(workspace.store.root)]
    with read_only(workspace.store.root):
        assert run(merge) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "cannot be written: Read-only file system" in said
    assert "bug" not in said
    assert run(merge) == 0, "the control"


def test_the_lineage_names_both_parents_and_how(two: tuple[Workspace, list[Path]]) -> None:
    workspace, _ = two
    found = workspace.merge(["a", "b@1"], "both", how="svd")
    lineage = workspace.show("both")["manifest"]["lineage"]
    assert lineage["parents"] == [workspace.resolve("a").digest, workspace.resolve("b").digest]
    assert lineage["merge"] == {"how": "svd", "weights": [0.5, 0.5], "density": 0.5}
    assert (found.version, found.parents) == ("both@1", ["a@1", "b@1"])
    again = workspace.merge(["a", "b@1"], "both", how="svd")
    assert again.version == "both@1"  # the same content is the same version


def test_what_cannot_be_merged_is_refused_in_one_line(two: tuple[Workspace, list[Path]], workspace: Workspace) -> None:
    ours, _ = two
    with pytest.raises(RecipeError, match="needs at least two versions, given 1"):
        ours.merge(["a"], "x")
    with pytest.raises(RecipeError, match="2 versions are named and 3 weights"):
        ours.merge(["a", "b"], "x", weights=[1, 2, 3])
    with pytest.raises(RecipeError, match="--how mean: expected one of linear, svd"):
        ours.merge(["a", "b"], "x", how="mean")
    with pytest.raises(AdapterError, match=r"its base is sha256:.*merge versions of one base, task and method"):
        workspace.merge(["sentiment", "writer"], "x")
    with pytest.raises(AdapterError, match="its method is prefix, and there it is lora"):
        workspace.merge(["writer", "prefix"], "x")
    with pytest.raises(AdapterError, match="adapters of prefix cannot be merged with one another"):
        workspace.merge(["prefix", "prefix"], "x")
    assert [version.name for version in workspace.list("x")] == []


def test_adapters_without_heads_may_have_weights_that_add_up_to_nothing() -> None:
    assert _mean([{}, {}], [1.0, -1.0]) == {}
    with pytest.raises(RecipeError, match="the weights add up to 0, so there is no mean of the heads"):
        _mean([{"head": torch.ones(2)}] * 2, [1.0, -1.0])


def test_the_command_says_what_it_made(two: tuple[Workspace, list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(two[0].store.root)]
    assert run(["merge", "a", "b", "--name", "c", "--how", "ties", "--weights", "1,0.5", "--json", *store]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["version"], said["parents"], said["weights"]) == ("c@1", ["a@1", "b@1"], [1.0, 0.5])
    assert run(["merge", "a", "b", "--name", "c", "--how", "mean", *store]) == 2
    assert "--how mean: expected one of linear, svd" in capsys.readouterr().err
    assert run(["merge", "a", "b", "--name", "c", "--weights", "much,less", *store]) == 2
    assert "--weights 'much': expected numbers" in capsys.readouterr().err
