"""A training whose loss stays at the level of guessing reports it: in its records, its result and the lineage."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import tiny_training as tiny
import torch
from tiny_training import fit

from turret import adapters
from turret.data import Labelled
from turret.tasks.classify import Classify, balanced_weights
from turret.train.loop import FEWEST, WINDOW, flat_loss

GUESSING = math.log(2)


def noisy(mean: float, count: int = WINDOW, spread: float = 0.05) -> list[float]:
    chance = random.Random(0)
    return [mean + chance.gauss(0, spread) for _ in range(count)]


@pytest.mark.parametrize("losses", [noisy(GUESSING), noisy(0.70), noisy(0.72, spread=0.3), noisy(GUESSING, FEWEST)])
def test_losses_at_the_level_of_guessing_are_flat(losses: list[float]) -> None:
    found = flat_loss(losses, GUESSING)
    assert found is not None
    assert "0.693" in found.warning()
    assert found.to_json()["guessing"] == GUESSING


@pytest.mark.parametrize(
    ("losses", "guessing"),
    [
        (noisy(0.66), GUESSING),  # learns slowly
        (noisy(0.01, spread=0.001), GUESSING),
        (noisy(GUESSING, FEWEST - 1), GUESSING),  # too few to tell
        (noisy(3.0), None),  # a task without such a level
        ([*noisy(GUESSING, 200), *noisy(0.4)], GUESSING),  # only the latest count
    ],
)
def test_losses_below_it_or_too_few_are_not(losses: list[float], guessing: float | None) -> None:
    assert flat_loss(losses, guessing) is None


def task(weights: Any = None, multi_label: bool = False) -> Classify:
    made: Any = tiny.small_models.tokenizer("bert")
    return Classify(("a", "b", "c"), made, 16, multi_label=multi_label, class_weights=weights)


@pytest.mark.parametrize("weights", [None, {"a": 3.0}, "balanced"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_guessing_is_the_best_answer_that_does_not_read(weights: Any, multi_label: bool) -> None:
    """Against the loss that gradient descent finds for one row of logits."""
    labels = ["a"] * 6 + ["b"] * 3 + ["c"]
    rows = [Labelled(str(at), (label,) if multi_label else label) for at, label in enumerate(labels)]
    if weights == "balanced":
        weights = balanced_weights(("a", "b", "c"), rows, multi_label=multi_label)
    on = task(weights, multi_label)
    logits = torch.zeros(3, requires_grad=True)
    descent = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        descent.zero_grad()
        value = on.loss(logits.expand(len(rows), 3), on.targets(rows))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    descent.step(loss)  # type: ignore[arg-type, no-untyped-call]
    assert on.guessing_loss(rows) == pytest.approx(float(loss().detach()), abs=1e-4)


@pytest.mark.parametrize(("shuffled", "flat"), [(True, True), (False, False)])
def test_a_training_on_labels_that_mean_nothing_is_flagged(shuffled: bool, flat: bool) -> None:
    data = tiny.dataset(train=480)
    if shuffled:
        labels = [each.label for each in data.train]
        random.Random(0).shuffle(labels)
        data = replace(data, train=[Labelled(e.text, label) for e, label in zip(data.train, labels, strict=True)])
    on, made = tiny.base("bert"), tiny.recipe(train__epochs=1, train__lr=3e-3, train__evaluate="never")
    records, fitted = tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
    adapters.detach(on.model)
    assert not any(record.guessing for record in records[: WINDOW - 1])  # too early to tell
    assert (records[-1].guessing is not None) == flat
    assert (fitted.flat_loss is not None) == flat
    assert ("flat_loss" in fitted.adapter.lineage) == flat


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "epochs", "named"), [(1e-3, 10, []), (3e-3, 10, ["lr"]), (1e-4, 1, ["lr", "epochs"])])
def test_the_remedy_names_a_setting_only_if_it_is_not_the_usual_one(rate: float, epochs: int, named: list[str]) -> None:
    data = tiny.dataset(train=480)
    chance = random.Random(0)
    data = replace(data, train=[Labelled(each.text, chance.choice(["good", "bad"])) for each in data.train])
    on, made = tiny.base("bert"), tiny.recipe(train__epochs=epochs, train__lr=rate, train__evaluate="never")
    _, fitted = tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
    adapters.detach(on.model)
    assert fitted.flat_loss is not None
    said = fitted.flat_loss.warning()
    assert [key for key in ("lr", "epochs") if f"train.{key}" in said] == named
    assert said.endswith("use more examples, or another method")
    assert "\n" not in said


def test_a_task_that_writes_has_no_level_of_guessing() -> None:
    on, data = tiny.base("llama", "generate"), tiny.dataset("summarize", train=200)
    made = tiny.recipe(train__epochs=1, train__lr=1e-12, train__evaluate="never")
    _, fitted = tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
    adapters.detach(on.model)
    assert fitted.flat_loss is None
