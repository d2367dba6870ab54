"""Forgetting: the loss with an adapter against slot 0, on neutral texts and other tasks, and the gates on it."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_models
import tiny_training
import torch
from peft import PeftModel

from turret import LoRA, Workspace, adapters, bases, bundles
from turret.cli.main import run
from turret.errors import GateFailed
from turret.recipe import Recipe
from turret.workspace import forgetting
from turret.workspace.forgetting import PARAGRAPHS, Increase


def bundle_of(name: str, folder: Path, *, size: float, kind: str = "generate", recipe: bool = True) -> Path:
    """The bundle of a LoRA of random factors on a small base, whose lineage names data that is there.

    Args:
        size: of the factors: how much the adapter changes.
    """
    generates = kind == "generate"
    family = "llama" if generates else "bert"
    if not (folder / family).exists():
        small_models.save_base(family, folder / family)
    base = bases.load(
        str(folder / family), task="generate" if generates else "classify", num_labels=None if generates else 2
    )
    spec = tiny_training.task_of(tiny_training.recipe(), tiny_training.dataset(kind), base).spec()
    adapters.attach(base.model, LoRA(init_lora_weights=False), generator=torch.Generator().manual_seed(3))
    tensors, head, method = adapters.extract(base.model)
    tensors = {key: size * value for key, value in tensors.items()}
    head = {key: value + 0.1 * place for place, (key, value) in enumerate(head.items())}
    data = folder / f"{name}.csv"
    with data.open("w", newline="") as file:
        columns = ["prompt", "completion"] if generates else ["text", "label"]
        csv.writer(file).writerows(
            [columns, *([each.input, each.output] for each in tiny_training.dataset(kind).train)]
        )
    said = Recipe(name=name, base=base.id, data={"source": str(data), "test": 6}, task={"kind": kind})
    lineage = {"recipe": said.to_toml()} if recipe else {}
    info = adapters.BaseInfo(base.id, base.fingerprint, base.family.name)
    made = adapters.Adapter(method, tensors, head, info, spec, dict(spec.get("generation") or {}), lineage)
    bundles.save_bundle(made, folder / f"bundle-{name}")
    return folder / f"bundle-{name}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Bundles of two writers, one that changes the base much and one that hardly does, and of a classifier."""
    folder = tmp_path_factory.mktemp("forgetting")
    bundle_of("loud", folder, size=3.0)
    bundle_of("quiet", folder, size=0.05)
    bundle_of("still", folder, size=0.0)
    bundle_of("tone", folder, size=1.0, kind="classify")
    return folder


@pytest.fixture
def workspace(folder, tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "store")
    for name in ("loud", "quiet", "tone"):
        workspace.store.put(name, folder / f"bundle-{name}")
    return workspace


# --- the numbers ------------------------------------------------------------------------------------------------------


def mounted(folder: Path, name: str) -> bases.Base:
    """A small base in float32 with the adapter of a bundle in slot 1."""
    base = bases.load(str(folder / "llama"), task="generate", dtype="float32")
    adapters.mount(base.model, bundles.read_bundle(folder / f"bundle-{name}"))
    return base


def test_the_losses_are_those_of_peft_with_the_adapter_on_and_off(folder) -> None:
    ready = mounted(folder, "loud")
    found = forgetting.on_neutral_texts(ready.model, ready.tokenizer)
    base = bases.load(str(folder / "llama"), task="generate", dtype="float32")
    twin = PeftModel.from_pretrained(base.model, str(folder / "bundle-loud")).eval()

    def loss() -> float:
        total, count = 0.0, 0
        for text in PARAGRAPHS:
            ids = torch.tensor(base.tokenizer(text)["input_ids"])[: forgetting.MOST_TOKENS]
            lead = min(forgetting.LEAD, len(ids) // 2)
            with torch.no_grad():
                logits = twin(input_ids=ids[None]).logits[0, lead - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[lead:], reduction="sum"))
            count += len(ids) - lead
        return total / count

    assert found.loss == pytest.approx(loss(), abs=1e-4)
    with twin.disable_adapter():
        assert found.base_loss == pytest.approx(loss(), abs=1e-4)
    assert found.increase == pytest.approx(found.loss - found.base_loss, abs=1e-9)
    assert abs(found.increase) > 0.01  # the control: the adapter does change the loss
    assert found.low < found.increase < found.high
    assert found.texts == len(PARAGRAPHS)


def test_an_adapter_that_changes_nothing_forgets_nothing(folder) -> None:
    ready = mounted(folder, "still")
    found = forgetting.on_neutral_texts(ready.model, ready.tokenizer)
    assert (found.increase, found.low, found.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)


def test_the_interval_holds_the_true_increase_about_as_often_as_it_says() -> None:
    held, narrow, rng = [], [], np.random.default_rng(1)
    for _ in range(300):
        tokens = rng.integers(30, 90, size=24)
        more = tokens * (0.05 + 0.1 * rng.standard_normal(24))
        found = Increase.of((more + 100.0, tokens), (np.full(24, 100.0), tokens))
        held.append(found.low <= 0.05 <= found.high)
        middle, half = (found.low + found.high) / 2, (found.high - found.low) / 8
        narrow.append(middle - half <= 0.05 <= middle + half)
    assert 0.89 <= np.mean(held) <= 0.98  # a percentile bootstrap of 24 texts is a little too narrow
    assert np.mean(narrow) < 0.6  # the control: a quarter of the width does not


# --- gates ------------------------------------------------------------------------------------------------------------


def test_a_gate_measures_a_version_once_and_refuses_the_one_that_forgets(workspace, capsys) -> None:
    for name in ("loud", "quiet"):
        workspace.gate(name, "production", add=["forgetting.neutral_high<=0.05"])
    stages: list[str] = []
    with pytest.raises(GateFailed, match=r"loud@1 may not become loud@production: forgetting.neutral_high<=0\.05 is r"):
        workspace.promote("loud", "production", on_stage=stages.append)
    assert "measuring forgetting" in stages
    assert workspace.promote("quiet", "production").version == "quiet@1"
    stages.clear()
    workspace.promote("quiet", "production", on_stage=stages.append)
    assert stages == []
    (status,) = workspace.gate_status("quiet", "production")
    assert status.passes
    assert run(["show", "quiet", "--store", str(workspace.store.root)]) == 0
    assert re.search(r"neutral text [+-]0\.0\d\d \(", capsys.readouterr().out)
    assert workspace.verify().ok


def test_other_tasks_of_the_store_are_measured_and_measured_again_when_they_change(workspace, folder) -> None:
    workspace.gate("loud", "production", add=["forgetting.tasks<=100"])
    workspace.promote("loud", "production")
    found = workspace.resolve("loud").metrics["forgetting"]
    assert list(found["against"]) == ["quiet@1"]  # no classifier, and not its own task
    assert found["tasks"] == found["against"]["quiet@1"]["increase"]
    assert abs(found["tasks"]) > 0.05
    assert found["against"]["quiet@1"]["texts"] == 6
    assert found["tasks_low"] < found["tasks"] < found["tasks_high"]
    workspace.gate("quiet", "production", add=["forgetting.tasks_high<=0.1", "forgetting.against.loud@1.increase<=1"])
    workspace.promote("quiet", "production")
    adapter = bundles.read_bundle(folder / "bundle-quiet")
    bundles.save_bundle(replace(adapter, lineage={**adapter.lineage, "seed": 7}), folder / "bundle-third")
    workspace.store.put("third", folder / "bundle-third")
    stages: list[str] = []
    workspace.promote("loud", "production", on_stage=stages.append)
    assert stages.count("measuring forgetting on third@1") == 1
    assert set(workspace.resolve("loud").metrics["forgetting"]["against"]) == {"quiet@1", "third@1"}


def test_a_task_whose_data_is_gone_is_named_and_does_not_stop_the_promote(workspace, folder) -> None:
    adapter = bundles.read_bundle(folder / "bundle-quiet")
    recipe = adapter.lineage["recipe"].replace("quiet.csv", "gone.csv")
    bundles.save_bundle(replace(adapter, lineage={"recipe": recipe}), folder / "bundle-gone")
    workspace.store.put("quiet", folder / "bundle-gone")
    workspace.promote("loud", "production", require=["forgetting.tasks<=1"])
    found = workspace.resolve("loud").metrics["forgetting"]
    assert (found["tasks"], found["against"]) == (0.0, {})
    assert "gone.csv" in found["skipped"]["quiet@2"]


@pytest.mark.slow
def test_a_training_gives_forgetting_beside_the_metrics_of_its_splits(folder, tmp_path) -> None:
    workspace = Workspace(tmp_path / "store")
    data = {"source": str(folder / "quiet.csv"), "test": 6}
    recipe = Recipe(name="q", base=str(folder / "llama"), data=data, task={"kind": "generate"}, train={"epochs": 1})
    result = workspace.train(recipe)
    assert result.metrics.keys() == {"test"}
    assert result.forgetting == workspace.resolve("q").metrics["forgetting"]
    assert {"neutral", "neutral_low", "neutral_high"} <= result.as_json()["forgetting"].keys()


def test_a_classifier_has_no_forgetting_and_a_gate_says_so(workspace) -> None:
    with pytest.raises(
        GateFailed, match=r"forgetting is not defined for a version that classifies, because it answers"
    ):
        workspace.promote("tone", "production", require=["forgetting.neutral<=1"])
    assert workspace.promote("tone", "production").version == "tone@1"  # the control


def test_a_server_measures_nothing_and_names_the_command_that_does(workspace) -> None:
    with pytest.raises(GateFailed, match=r"it is not measured yet: run `turret promote quiet@1 production`"):
        workspace.promote("quiet", "production", require=["forgetting.neutral<=1"], ask=lambda *_: [])
    workspace.promote("quiet", "production", require=["forgetting.neutral<=1"])
    workspace.promote("quiet", "production", require=["forgetting.neutral<=1"], ask=lambda *_: [])


def test_the_gate_is_set_by_the_command_line(workspace, capsys) -> None:
    store = ["--store", str(workspace.store.root)]
    assert run(["gate", "quiet", "production", "forgetting.neutral<=0.1", *store]) == 0
    assert "forgetting.neutral<=0.1" in capsys.readouterr().out
    assert run(["promote", "loud", "production", "--require", "forgetting.neutral<=0.01", *store]) == 1
    assert "forgetting.neutral<=0.01 is required, found" in capsys.readouterr().err
