"""The device of a training is chosen from its predicted memory, before its base is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import small_models
import tiny_training as tiny
import torch
from tiny_training import plan

from turret import adapters
from turret.adapters.lifecycle import CheckpointedForward
from turret.bases.device import CPU, ChosenDevice, Gpu, Machine
from turret.errors import DeviceError, PreflightRefused
from turret.methods.method import Check
from turret.recipe import Recipe
from turret.tasks import task_of
from turret.train.batches import pass_tokens
from turret.train.initialize import attach
from turret.train.slot import LocalSlot
from turret.train.training_plan import Plan
from turret.workspace.resident import PreparedTraining, checkpoints_for, choose_for, pass_tokens_for, predicted_for
from turret.workspace.results import Planned
from turret.workspace.training import with_checkpoints

MB = 1_000_000


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = small_models.save_base("bert", tmp_path_factory.mktemp("bert"))
    return Recipe(name="films", base=folder, data="films.csv", train={"dtype": "float32"})


def gpu(free: int, number: int = 0) -> Gpu:
    return Gpu(torch.device("cuda", number), "Small", free, 8_000 * MB)


def on(recipe: Recipe, device: str) -> Recipe:
    return recipe.with_overrides({"train.device": device})


CLASSIFY, LABELS = task_of("classify"), ("bad", "good")


def test_a_gpu_takes_a_training_that_is_predicted_to_fit(recipe: Recipe) -> None:
    predicted = predicted_for(recipe, CLASSIFY, LABELS, torch.device("cuda", 0))
    assert predicted is not None
    enough, short = predicted.total + MB, predicted.total - MB
    assert str(choose_for(recipe, CLASSIFY, LABELS, Machine((gpu(enough),))).device) == "cuda:0"
    whole = recipe.with_overrides({"train.checkpoint_layers": "false"})
    chosen = choose_for(whole, CLASSIFY, LABELS, Machine((gpu(short),)))
    assert chosen.device.type == "cpu"
    assert "are needed, and the GPU with the most free memory is cuda:0" in chosen.reason


def test_a_gpu_that_is_named_is_refused_if_not_even_the_weights_fit(recipe: Recipe) -> None:
    with pytest.raises(PreflightRefused, match="does not fit on cuda:0 with 300 MB free: its weights take"):
        choose_for(on(recipe, "cuda"), CLASSIFY, LABELS, Machine((gpu(300 * MB),)))
    tight = predicted_for(recipe, CLASSIFY, LABELS, torch.device("cuda", 0))
    assert tight is not None
    free = tight.total - tight.activations // 2  # a smaller pass may fit: the plan measures it
    assert str(choose_for(on(recipe, "cuda:0"), CLASSIFY, LABELS, Machine((gpu(free),))).device) == "cuda:0"


def test_the_cpu_is_taken_as_it_is_named_and_without_a_gpu(recipe: Recipe) -> None:
    assert choose_for(on(recipe, "cpu"), CLASSIFY, LABELS, Machine((gpu(8_000 * MB),))).device.type == "cpu"
    assert choose_for(recipe, CLASSIFY, LABELS, Machine()).device.type == "cpu"
    with pytest.raises(DeviceError, match="device cuda is not there"):
        choose_for(on(recipe, "cuda"), CLASSIFY, LABELS, Machine())


def test_a_longer_text_needs_more(recipe: Recipe) -> None:
    at = torch.device("cuda", 0)
    short, long = (
        predicted_for(recipe.with_overrides({"task.max_tokens": str(tokens)}), CLASSIFY, LABELS, at)
        for tokens in (16, 256)
    )
    assert short is not None
    assert long is not None
    assert long.activations > 2 * short.activations


# --- layers are checkpointed if the training would not fit otherwise --------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = small_models.save_base("llama", tmp_path_factory.mktemp("deep"), num_hidden_layers=8)
    task = {"max_tokens": 200, "max_target_tokens": 40}
    return Recipe(name="lines", base=folder, data="lines.csv", task=task, train={"dtype": "float32"})


def test_a_small_gpu_takes_a_training_with_checkpointed_layers_and_says_why(deep: Recipe) -> None:
    at, generate = torch.device("cuda", 0), task_of("generate")
    whole, light = (predicted_for(deep, generate, (), at, checkpointed=each) for each in (False, True))
    assert whole is not None
    assert light is not None
    assert light.total + 5 * MB < whole.total
    small, large = Machine((gpu((whole.total + light.total) // 2),)), Machine((gpu(whole.total + MB),))
    assert str(choose_for(deep, generate, (), small).device) == "cuda:0"
    why = checkpoints_for(deep, generate, (), at, small)
    assert why is not None
    assert "would be needed without it, and" in why
    assert checkpoints_for(deep, generate, (), at, large) is None
    assert checkpoints_for(deep, generate, (), torch.device("cpu"), small) is None
    for decided in ("true", "false"):  # the recipe has the last word
        assert (
            checkpoints_for(deep.with_overrides({"train.checkpoint_layers": decided}), generate, (), at, small) is None
        )
    assert (
        choose_for(deep.with_overrides({"train.checkpoint_layers": "false"}), generate, (), small).device.type == "cpu"
    )
    assert choose_for(deep, generate, (), Machine((gpu(light.total - MB),))).device.type == "cpu"


def test_a_measured_plan_that_does_not_fit_its_gpu_is_tried_once_with_checkpointed_layers(deep: Recipe) -> None:
    data, base = tiny.dataset("summarize"), tiny.base("llama", "generate")
    task, at = tiny.task_of(tiny.recipe(), data, base), ChosenDevice(torch.device("cuda", 0), "as asked for")
    ready: Any = PreparedTraining(tiny.recipe(), data, base, base, task, [], 0.0, 0, None, at)  # type: ignore[arg-type]
    refused = [Check("memory", "refuse", "9.0 GB, 8.0 GB free", "lower it")]

    def planned(checks: list[Check]) -> Planned:
        return Planned(ready.recipe, Plan(tuple(checks), None, None, 1, 1e-3, None, 1), [])

    found = with_checkpoints(ready, planned(refused))
    assert found is not None
    assert found.base.checkpoints == "without it 9.0 GB, 8.0 GB free"
    assert with_checkpoints(found, planned(refused)) is None  # once
    assert with_checkpoints(ready, planned([])) is None
    assert with_checkpoints(ready, planned([*refused, Check("labels", "refuse", "one class", "more")])) is None
    assert with_checkpoints(replace(ready, device=ChosenDevice(CPU, "as asked for")), planned(refused)) is None
    rows = {row.name: row.text for row in plan(*found.parts, measured=False).checks}
    assert rows["checkpoint_layers"].endswith("a step computes the layers twice: without it 9.0 GB, 8.0 GB free")
    assert "checkpoint_layers" not in {row.name for row in plan(*ready.parts, measured=False).checks}
    for each, checkpointed in ((found, True), (ready, False)):
        attach(each.recipe, each.base, each.task)
        layer = each.base.model.model.layers[0]
        assert isinstance(vars(layer).get("forward"), CheckpointedForward) == checkpointed
        adapters.detach(each.base.model)


# --- tokens of a pass -------------------------------------------------------------------------------------------------


def test_a_pass_on_a_gpu_has_as_many_tokens_as_fit_and_a_cpu_keeps_its_own_number(deep: Recipe) -> None:
    at, generate = torch.device("cuda", 0), task_of("generate")
    wide = deep.with_overrides({"train.batch_size": "128"})

    def most(machine: Machine | None, recipe: Recipe = wide, device: torch.device = at) -> int | None:
        return pass_tokens_for(recipe, generate, (), device, machine)

    assert most(Machine((gpu(80_000 * MB),))) == 16384
    fixed, predicted = 0, None
    for tokens in (8192, 4096):
        predicted = predicted_for(wide.with_overrides({"train.micro_batch_tokens": str(tokens)}), generate, (), at)
        assert predicted is not None
        fixed = predicted.total - predicted.activations
        fitting = Machine((gpu(fixed + round(predicted.activations / 0.59)),))
        assert most(fitting) == tokens
    assert predicted is not None
    assert most(Machine((gpu(fixed + predicted.activations),))) is None, "the control: a share stays free"
    assert most(None, device=torch.device("cpu")) is None
    assert most(Machine((gpu(80_000 * MB),)), wide.with_overrides({"train.micro_batch_tokens": "700"})) is None
    config = tiny.base("llama", "generate", num_hidden_layers=8).model.config
    assert pass_tokens(wide.train, config, on_gpu=8192) == 8192
    assert pass_tokens(wide.train, config) <= 2048
    assert pass_tokens(wide.with_overrides({"train.micro_batch_tokens": "700"}).train, config, on_gpu=8192) == 700


@pytest.mark.slow
def test_a_training_makes_its_passes_of_so_many_tokens_and_the_plan_says_so(recipe: Recipe) -> None:
    on, data = tiny.base("bert", "classify"), tiny.dataset("classify")
    task = tiny.task_of(recipe, data, on)
    filled = tiny.filled(recipe, on, task, data)
    usual = LocalSlot.of_recipe(filled, on, task).most_tokens
    adapters.detach(on.model)
    assert usual <= 2048
    on.pass_tokens = 8192
    assert LocalSlot.of_recipe(filled, on, task).most_tokens == 8192
    adapters.detach(on.model)
    (row,) = [check for check in plan(recipe, on, task, data).checks if check.name == "passes"]
    assert "8,192 tokens" in row.text
