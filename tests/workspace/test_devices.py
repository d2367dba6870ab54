"""The device of a training is chosen from its predicted memory, before its base is read."""

from __future__ import annotations

import pytest
import small_models
import torch

from turret.bases.device import Card, Machine
from turret.errors import DeviceError, PreflightRefused
from turret.recipe import Recipe
from turret.tasks import task_of
from turret.workspace.devices import choose_for, predicted_for

MB = 1_000_000


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = small_models.save_base("bert", tmp_path_factory.mktemp("bert"))
    return Recipe(name="films", base=folder, data="films.csv", train={"dtype": "float32"})


def card(free: int, number: int = 0) -> Card:
    return Card(torch.device("cuda", number), "Small", free, 8_000 * MB)


def on(recipe: Recipe, device: str) -> Recipe:
    return recipe.with_overrides({"train.device": device})


CLASSIFY, LABELS = task_of("classify"), ("bad", "good")


def test_a_card_takes_a_training_that_is_predicted_to_fit(recipe: Recipe) -> None:
    predicted = predicted_for(recipe, CLASSIFY, LABELS, torch.device("cuda", 0))
    assert predicted is not None
    enough, short = predicted.total + MB, predicted.total - MB
    assert str(choose_for(recipe, CLASSIFY, LABELS, Machine((card(enough),))).device) == "cuda:0"
    chosen = choose_for(recipe, CLASSIFY, LABELS, Machine((card(short),)))
    assert chosen.device.type == "cpu"
    assert "are needed, and the emptiest card is cuda:0" in chosen.reason


def test_a_card_that_is_named_is_refused_if_not_even_the_weights_fit(recipe: Recipe) -> None:
    with pytest.raises(PreflightRefused, match="does not fit on cuda:0 with 300 MB free: its weights take"):
        choose_for(on(recipe, "cuda"), CLASSIFY, LABELS, Machine((card(300 * MB),)))
    tight = predicted_for(recipe, CLASSIFY, LABELS, torch.device("cuda", 0))
    assert tight is not None
    free = tight.total - tight.activations // 2  # a smaller pass may fit: the plan measures it
    assert str(choose_for(on(recipe, "cuda:0"), CLASSIFY, LABELS, Machine((card(free),))).device) == "cuda:0"


def test_the_cpu_is_taken_as_it_is_named_and_without_a_card(recipe: Recipe) -> None:
    assert choose_for(on(recipe, "cpu"), CLASSIFY, LABELS, Machine((card(8_000 * MB),))).device.type == "cpu"
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
