"""Every verb on a base in 4 bits: plan, train, predict, evaluate, export, import, serve, compare."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_models
from four_bits import needs_bitsandbytes
from test_workspace import write_reviews

from turret import quantized
from turret.engine import SamplingParams
from turret.errors import BaseModelError, RecipeError
from turret.recipe import Recipe
from turret.workspace import Workspace

pytestmark = [needs_bitsandbytes, pytest.mark.slow]
TEXTS = ["a great film", "dull and boring"]


@dataclass
class Trained:
    folder: Path
    recipe: Recipe
    workspace: Workspace
    result: Any


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("quantized")
    recipe = Recipe(
        name="reviews",
        base=str(small_models.save_base("bert", folder / "bert")),
        base_quantization="nf4",
        data=str(write_reviews(folder / "reviews")),
        train={"epochs": 8, "lr": 5e-3, "checkpoint_layers": True, "optimizer": "adamw8bit", "dtype": "float32"},
    )
    workspace = Workspace(folder / "store")
    return Trained(folder, recipe, workspace, workspace.train(recipe))


def test_a_plan_counts_the_packed_weights_and_says_that_there_are_some(trained: Trained) -> None:
    planned = trained.workspace.plan(trained.recipe)
    plain = trained.workspace.plan(trained.recipe.model_copy(update={"base_quantization": None}))
    assert planned.plan.memory is not None
    assert plain.plan.memory is not None
    assert planned.plan.memory.weights < plain.plan.memory.weights
    assert planned.plan.total == plain.plan.total
    assert any("kept in nf4" in note for note in planned.notes)


def test_a_training_is_proved_and_its_manifest_names_the_quantisation(trained: Trained) -> None:
    base = trained.workspace.show("reviews")["manifest"]["base"]
    assert base["quantization"] == "nf4"
    plain = trained.workspace.plan(trained.recipe.model_copy(update={"base_quantization": None}))
    assert plain.recipe.base == base["id"]
    assert trained.result.base["fingerprint"] == base["fingerprint"]


def test_it_predicts_and_evaluates_on_the_base_as_it_was_trained(trained: Trained) -> None:
    one, other = trained.workspace.predict("reviews", TEXTS)
    assert one["probabilities"] != other["probabilities"]
    found = trained.workspace.evaluate("reviews", str(trained.folder / "reviews"))
    assert found.metrics["loss"] == pytest.approx(
        trained.result.metrics["test"]["loss"], rel=5e-2
    )  # of a small loss, in bfloat16


def test_in_float32_an_evaluation_has_the_loss_of_the_training(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the difference that the test before allows is that of rounding to bfloat16: the training was in float32."""
    monkeypatch.setattr("turret.bases.device.native_bfloat16", lambda device: False)  # as on older processors
    found = trained.workspace.evaluate("reviews", str(trained.folder / "reviews"))
    assert found.metrics["loss"] == pytest.approx(trained.result.metrics["test"]["loss"], rel=1e-4)


def test_a_recipe_takes_it_as_text_and_refuses_what_cannot_be(trained: Trained) -> None:
    plain = trained.recipe.with_overrides({"base_quantization": "none"})
    assert plain.base_quantization is None
    assert "base_quantization" not in plain.to_toml()
    assert plain.with_overrides({"base_quantization": "nf4"}) == trained.recipe
    assert Recipe.from_toml(trained.recipe.to_toml()) == trained.recipe
    assert Recipe.from_toml('base_quantization = "none"\n' + plain.to_toml()) == plain
    with pytest.raises(RecipeError, match=r'base_quantization = "nf4": method full trains the weights themselves'):
        trained.recipe.with_overrides({"method": "full"})
    with pytest.raises(RecipeError, match="base_quantization: expected"):
        trained.recipe.with_overrides({"base_quantization": "int3"})


def test_an_export_comes_back_unchanged_and_a_merge_says_what_it_costs(trained: Trained, tmp_path: Path) -> None:
    workspace = trained.workspace
    workspace.export("reviews", tmp_path / "bundle")
    again = workspace.import_adapter(tmp_path / "bundle", "again")
    assert again.digest == workspace.resolve("reviews").digest
    with pytest.raises(RecipeError, match="leave --base-quantization out"):
        workspace.import_adapter(tmp_path / "bundle", "again", base_quantization="nf4")
    assert "| base quantization | `nf4` |" in (tmp_path / "bundle" / "README.md").read_text()
    notes = workspace.export("reviews", tmp_path / "merged", form="merged").notes
    cost = next(note for note in notes if "trained on the base in nf4" in note)
    assert "outputs change by" in cost


def test_a_merge_without_the_library_says_that_nothing_was_measured(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with quantized.hide_package("bitsandbytes"):
        notes = trained.workspace.export("reviews", tmp_path / "merged", form="merged").notes
        assert any("was not measured" in note for note in notes)
        with pytest.raises(BaseModelError, match=r"pip install 'turret\[quantized\]'"):
            trained.workspace.predict("reviews", TEXTS)


def test_a_plain_peft_folder_is_imported_on_four_bits(trained: Trained, tmp_path: Path) -> None:
    trained.workspace.export("reviews", tmp_path / "peft")
    (tmp_path / "peft" / "manifest.json").unlink()
    labels = trained.workspace.show("reviews")["manifest"]["task"]["labels"]
    found = trained.workspace.import_adapter(
        tmp_path / "peft", "foreign", base=trained.recipe.base, labels=labels, base_quantization="nf4"
    )
    assert found.effect > 0
    assert trained.workspace.show("foreign")["manifest"]["base"]["quantization"] == "nf4"


def chances(engine: Any) -> list[float]:
    return [engine.submit("classify", text, "reviews").result(60)["probabilities"]["good"] for text in TEXTS]


def test_it_is_served_in_4_bits_as_it_predicts_and_on_plain_weights_with_one_warning(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    predicted = [each["probabilities"]["good"] for each in trained.workspace.predict("reviews", TEXTS)]
    with trained.workspace.engine(trained.recipe.base, dtype="auto", base_quantization="nf4") as engine:
        assert chances(engine) == pytest.approx(predicted, abs=2e-2)
    assert not caplog.records
    with caplog.at_level(logging.WARNING), trained.workspace.engine(trained.recipe.base, dtype="auto") as engine:
        plain = chances(engine)
        assert chances(engine) == plain
        engine.unload("reviews")
        chances(engine)
    warnings = [each.getMessage() for each in caplog.records if each.name == "turret.serving"]
    assert len(warnings) == 1
    assert "reviews@1 was trained on base_quantization nf4 and is served on none" in warnings[0]
    assert plain != pytest.approx(predicted, abs=1e-4)  # the control: other weights answered


def test_a_comparison_trains_and_answers_in_4_bits(trained: Trained) -> None:
    found = trained.workspace.compare(trained.recipe, methods="base,head,lora", against="head", seeds=2)
    assert "weights in 4 bits" in (Path(found.folder) / "report.html").read_text()


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_a_generator_writes_in_4_bits(family: str, tmp_path: Path) -> None:
    from small_tables import NEWS, write_csv

    recipe = Recipe(
        base=str(small_models.save_base(family, tmp_path / family)),
        base_quantization="nf4",
        data=str(write_csv(tmp_path / "news.csv", NEWS)),
        train={"epochs": 1, "checkpoint_layers": True},
        task={"max_tokens": 32, "max_new_tokens": 4},
    )
    workspace = Workspace(tmp_path / "store")
    workspace.train(recipe)
    (predicted,) = workspace.predict("news", ["article 3"])
    with workspace.engine(recipe.base, base_quantization="nf4") as engine:
        assert (
            engine.submit("generate", "article 3", "news", SamplingParams(max_tokens=4)).result(60)["text"]
            == predicted["text"]
        )
