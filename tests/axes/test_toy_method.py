"""A method in one file goes through everything, and no other file of the package changes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from adapters_at_hand import METHODS as AT_HAND
from adapters_at_hand import alone, made, runner_of
from axes.points import TOLERANCE, classify_labels, known_to_children, require_one_pass_as_alone, served
from axes.toy_method import Scale
from batches import rows, with_eos

from turret.adapters import attach, classify_logits, detach, extract
from turret.engine.sequence import Prefill
from turret.errors import AdapterError, BundleError, RecipeError
from turret.methods import METHODS, Full, LoRA
from turret.recipe import Recipe
from turret.workspace import RunResult, Workspace

WORDS = {"good": "a great film", "bad": "a dull story about the bank"}
TEXTS = ["a great film", "a dull story about the bank", "quick"]
CHILDREN = """
from axes.toy_method import Scale
from turret.methods import METHODS
METHODS["scale"] = Scale
"""  # child processes run this first


@dataclass
class House:
    """A store with one version of the toy method and one LoRA on one base."""

    base: Path
    recipe: Recipe
    workspace: Workspace
    result: RunResult
    plans: list[Any]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The method is in the table, here and in child processes."""
    with known_to_children(tmp_path_factory.mktemp("beside"), CHILDREN) as patch:
        patch.setitem(METHODS, "scale", Scale)
        yield


@pytest.fixture(scope="module")
def house(registered: None, tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    base, data = small_models.save_base("bert", folder / "bert"), folder / "reviews.csv"
    with data.open("w", newline="") as file:
        labels = list(WORDS)
        rows = [(f"{WORDS[labels[row % 2]]}, number {row}", labels[row % 2]) for row in range(40)]
        csv.writer(file).writerows([("text", "label"), *rows])
    recipe = Recipe(name="scaled", base=str(base), data=str(data), method="scale", train={"epochs": 3})
    workspace, plans = Workspace(folder / "store"), list[Any]()
    result = workspace.train(recipe, on_plan=plans.append)
    workspace.train(recipe.with_overrides({"name": "adapted", "method": "lora"}))
    return House(base, recipe, workspace, result, plans)


def test_without_the_file_the_method_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(METHODS, "scale", raising=False)
    with pytest.raises(RecipeError, match=r"method\.kind: expected lora, prefix, head, full, peft, given 'scale'"):
        Recipe(name="a", base="b", data="c", method="scale")


def test_a_recipe_with_it_keeps_its_settings(registered: None) -> None:
    made = Recipe(name="a", base="b", data="c").with_overrides({"method": "scale", "method.seed": "3"})
    assert made.method == Scale(seed=3)
    assert Recipe.from_toml(made.to_toml()) == made
    with pytest.raises(RecipeError, match=r'it belongs to method\.kind = "lora", this method is "scale"'):
        made.with_overrides({"method.r": "4"})


def test_it_starts_equal_to_the_base_and_takes_the_base_back_unchanged() -> None:
    model, rows = small_models.build("bert", "classify").eval(), [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    before = classify_logits(attach(model, Scale()), rows, [0, 0])
    torch.testing.assert_close(classify_logits(model, rows), before, rtol=0, atol=1e-6)
    assert {name.rsplit(".", 1)[1] for name in extract(model).tensors} == {"scale"}
    detach(model)
    assert not [name for name, _ in model.named_modules() if "turret" in name]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@torch.no_grad()
def test_in_a_mixed_batch_it_answers_as_alone(family: str) -> None:
    adapters = [made(family, "classify", method, seed) for seed, method in enumerate((Scale(), AT_HAND["lora"]))]
    runner, slots = runner_of(family, "classify", adapters), [1, 2, 1, 2]
    inputs = with_eos(runner.model, rows(lengths=(9, 3, 14, 6)))
    outcome = runner.run([Prefill(row.tolist(), slot) for row, slot in zip(inputs, slots, strict=True)])
    for row, slot, logits in zip(inputs, slots, outcome.classes, strict=True):
        expected = classify_logits(alone(family, "classify", adapters[slot - 1]), [row])[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    without = replace(adapters[0], tensors={name: each * 0 for name, each in adapters[0].tensors.items()})
    control = classify_logits(alone(family, "classify", without), inputs[:1])[0]
    assert float((outcome.classes[0] - control).abs().max()) > 1e-3


@pytest.mark.slow
def test_plan_training_proof_and_store(house: House) -> None:
    (planned,) = house.plans
    assert not planned.plan.refused
    assert "a scale for every output" in next(each.text for each in planned.plan.checks if each.name == "method")
    assert planned.recipe.train.lr == 5e-3
    assert house.result.timing["proof_seconds"] > 0  # what fails it is not stored
    version = house.workspace.resolve("scaled@1")
    assert version.method == {"kind": "scale", "seed": 7}
    assert version.metrics["test"]["accuracy"] > 0.5


@pytest.mark.slow
def test_a_training_that_starts_from_it(house: House) -> None:
    further = house.recipe.with_overrides({"train.init_from": "scaled@1", "train.max_steps": "1", "train.lr": "1e-9"})
    house.workspace.train(further.model_copy(update={"name": "further"}))
    for own, first in zip(*(house.workspace.predict(name, TEXTS) for name in ("further", "scaled@1")), strict=True):
        assert own["probabilities"] == pytest.approx(first["probabilities"], abs=TOLERANCE)


@pytest.mark.slow
def test_a_mixed_batch_with_a_lora_and_the_server(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = house.workspace.engine(str(house.base), dtype="float32")
    expected = require_one_pass_as_alone(house.workspace, engine, ("scaled@1", "adapted"), TEXTS, monkeypatch)
    with served(house.workspace, engine) as client:
        labels = classify_labels(client, "scaled@1", TEXTS)
    assert labels == [answer["label"] for answer in expected["scaled@1"]]


@pytest.mark.slow
def test_a_comparison_names_it_with_its_settings(house: House) -> None:
    found = house.workspace.compare(house.recipe, methods="base,scale:seed=3,lora", against="lora", seeds=1)
    assert [row.spec for row in found.rows] == ["base", "scale:seed=3", "lora"]
    row = next(row for row in found.rows if row.kind == "scale")
    assert row.score is not None
    assert row.lr == 5e-3


@pytest.mark.slow
def test_export_import_and_a_merged_model_work_and_peft_and_vllm_refuse(house: House, tmp_path: Path) -> None:
    house.workspace.export("scaled@1", tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle" / "adapter_config.json").read_text())["peft_type"] is None
    assert "PEFT does not load it" in (tmp_path / "bundle" / "README.md").read_text()
    again = Workspace(tmp_path / "store")
    assert again.import_adapter(tmp_path / "bundle", "scaled").digest == house.workspace.resolve("scaled@1").digest
    assert again.predict("scaled", TEXTS) == house.workspace.predict("scaled@1", TEXTS)
    house.workspace.export("scaled@1", tmp_path / "merged", form="merged")  # read back and compared there
    with pytest.raises(AdapterError, match="vLLM serves only LoRA, and this is a scale"):
        house.workspace.export("scaled@1", tmp_path / "vllm", form="vllm")
    (tmp_path / "bundle" / "manifest.json").unlink()
    with pytest.raises(BundleError, match="has peft_type None: expected LORA or PREFIX_TUNING"):
        again.import_adapter(tmp_path / "bundle", "plain")


def test_the_protocol_has_defaults_for_what_it_leaves_out() -> None:
    assert (Scale().defaults("encoder", "classify").steps, Scale().head_lr_ratio) == (250, None)
    assert Scale.shares_base
    assert not Full.shares_base
    assert LoRA(r=4).vllm_rank == 4
    assert Scale().vllm_rank is None
