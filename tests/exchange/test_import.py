"""An adapter from outside is checked on its base and stored; what it states itself need not be given."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from exchange.foreign import (
    CONFIG,
    LABELS,
    MANIFEST,
    TEXTS,
    WEIGHTS,
    change_config,
    contents,
    peft_folder,
    refused,
)
from safetensors.torch import load_file, save_file

from turret import adapters, bases, bundles
from turret.bundles import fetch
from turret.cli.main import run
from turret.errors import BundleError, TurretError
from turret.methods import LoRA
from turret.workspace import Exported, Imported, Workspace

# --- what a PEFT folder does not say ---------------------------------------------------------------------------------


def test_the_base_is_the_one_the_configuration_names_where_none_is_given(
    folder: Path, bert: Path, tmp_path: Path
) -> None:
    change_config(folder, base_model_name_or_path=str(bert))
    found = Workspace(tmp_path / "store").import_adapter(folder, "x", labels=LABELS)
    assert found.base["id"] == str(bert)
    assert any("the one that its configuration names" in note for note in found.notes)


def test_a_head_that_the_adapter_lacks_is_the_bases_own_with_its_labels(tmp_path: Path) -> None:
    base = small_models.build("bert", "classify")
    base.config.id2label = dict(enumerate(LABELS))
    base.save_pretrained(tmp_path / "base")
    small_models.tokenizer("bert").save_pretrained(tmp_path / "base")
    peft_folder("bert", "classify", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "classifier" not in k}, tmp_path / "peft" / WEIGHTS)
    found = Workspace(tmp_path / "store").import_adapter(tmp_path / "peft", "x", base=str(tmp_path / "base"))
    assert found.task == {"kind": "classify", "labels": LABELS}
    assert len([note for note in found.notes if "base's own" in note or "labels are those" in note]) == 2


def test_settings_of_the_task_are_kept(workspace: Workspace, llama: Path, tmp_path: Path) -> None:
    peft_folder("llama", "generate", tmp_path / "peft")
    store = str(tmp_path / "store")
    command = ["import", str(tmp_path / "peft"), "--name", "x", "--base", str(llama), "--store", store]
    assert run([*command, "--set", "task.prefix_text=Say: ", "--set", "task.max_new_tokens=5"]) == 0
    task = Workspace(store).show("x")["manifest"]["task"]
    assert task["template"] == "Say: {document}\n"
    assert task["generation"]["max_new_tokens"] == 5


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ((), "nothing names the 3 outputs of the head: give --labels"),
        (("--labels", "a,b"), "the head has 3 outputs, and 2 labels are given"),
        (("--labels", "a,b,c,d"), "the head has 3 outputs, and 4 labels are given"),
        (("--labels", "a,a,b"), "classes must be different"),
        (("--labels", "a,,b"), "a label is empty"),
        (("--task", "poetry"), "its task 'poetry' is not known"),
        (("--task", "summarize"), "is an encoder (bert) and cannot generate"),
        (("--labels", "a,b,c", "--set", "task.kind=classify"), "give --task instead"),
        (("--labels", "a,b,c", "--set", "task.prefix=x"), "unknown key 'task.prefix'"),
        (("--labels", "a,b,c", "--set", "train.lr=1"), "expected a key of [task]"),
    ],
)
def test_what_is_said_wrongly_is_one_line(more, text, foreign, bert, tmp_path, capsys) -> None:
    assert text in refused(capsys, tmp_path / "store", foreign, "--base", str(bert), *more)


def test_a_bundle_says_its_task_itself(bundle, tmp_path, capsys) -> None:
    assert "leave --task, --labels out" in refused(
        capsys, tmp_path / "store", bundle, "--task", "classify", "--labels", "a,b,c"
    )


def test_a_bundle_without_a_task_is_told_it_and_keeps_its_base(bert, tmp_path, capsys) -> None:
    base = bases.load(str(bert), task="classify", num_labels=2, dtype="float32")
    model = adapters.attach(base.model, LoRA(r=2, init_lora_weights=False), generator=torch.Generator().manual_seed(1))
    bundles.save(model, tmp_path / "mine", base=str(bert))
    other = small_models.save_base("bert", tmp_path / "other", seed=1)
    said = refused(capsys, tmp_path / "store", tmp_path / "mine", "--labels", "a,b", "--base", str(other))
    assert "was trained on base" in said
    workspace = Workspace(tmp_path / "store")
    found = workspace.import_adapter(tmp_path / "mine", "x", labels=["a", "b"])
    assert found.base == {"id": str(bert), "fingerprint": base.fingerprint}
    assert workspace.predict("x", TEXTS)


def test_a_bundle_on_a_base_that_is_called_otherwise_here_gets_the_new_name(bundle, bert, tmp_path) -> None:
    moved = shutil.copytree(bert, tmp_path / "moved")
    workspace = Workspace(tmp_path / "store")
    found = workspace.import_adapter(bundle, "x", base=str(moved))
    assert found.base["id"] == str(moved)
    assert any("the digest is new" in note for note in found.notes)
    assert workspace.predict("x", TEXTS)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_out_of_reach_is_one_line(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, tmp_path / "store", "owner/adapter")
    assert "the Hub cannot be reached: give a folder or an archive instead" in said


def test_an_adapter_of_the_hub_is_copied_out_of_its_cache_with_its_commit(foreign, tmp_path) -> None:
    """A fake of the Hub's client: a snapshot of links into a cache, with only the requested files."""
    asked: list[Any] = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        snapshot = tmp_path / "cache" / "snapshots" / ("c" * 40)
        snapshot.mkdir(parents=True)
        for name in (WEIGHTS, CONFIG):
            os.symlink(foreign / name, snapshot / name)
        return str(snapshot)

    brought = fetch.fetch("owner/adapter", tmp_path / "beside", download=download)
    assert asked == [("owner/adapter", [WEIGHTS, CONFIG, MANIFEST])]
    assert brought.revision == "c" * 40
    assert contents(brought.folder) == {name: (foreign / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    assert not any(path.is_symlink() for path in brought.folder.iterdir())


def test_a_repository_without_safetensors_is_refused(tmp_path) -> None:
    (tmp_path / "snapshot").mkdir()
    with pytest.raises(BundleError, match=r"has no adapter_model\.safetensors: only safetensors files are fetched"):
        fetch.fetch("owner/adapter", tmp_path / "beside", download=lambda *_, **__: str(tmp_path / "snapshot"))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_commands_say_what_they_did_and_json_has_the_documented_keys(foreign, bert, tmp_path, capsys) -> None:
    store = ["--store", str(tmp_path / "store")]
    command = ["import", str(foreign), "--name", "x", "--base", str(bert), "--labels", "bad, good, odd", *store]
    assert run(command) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("x@1", "sha256:", "lora", "classify  bad, good, odd", "all tensors are used"))
    assert run([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {field.name for field in fields(Imported)}
    assert run(["export", "x", str(tmp_path / "out"), *store]) == 0
    assert "a bundle that PEFT loads" in capsys.readouterr().out
    assert run(["export", "x", str(tmp_path / "out"), *store]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert run(["export", "x", str(tmp_path / "out"), "--force", "--json", *store]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {field.name for field in fields(Exported)}
    assert run(["export", "x", str(tmp_path / "two"), "--merged", "--vllm", *store]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_every_key_of_the_results_is_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    for result in (Imported, Exported):
        for field in fields(result):
            assert f"`{field.name}`" in page, field.name


def test_errors_of_both_verbs_are_turrets_own(workspace, tmp_path) -> None:
    with pytest.raises(TurretError):
        workspace.import_adapter(tmp_path / "nowhere", "x")
    with pytest.raises(TurretError):
        workspace.export("sentiment@99", tmp_path / "out")
