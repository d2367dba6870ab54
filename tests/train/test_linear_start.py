"""A new head starts at the linear solution, with every method, and a killed training still ends in the same weights."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tiny_training import fit, plan

from turret import adapters
from turret.data import Dataset, Labelled
from turret.errors import LossNotFinite
from turret.train import linear_start
from turret.train.batches import EncodedRows, Schedule
from turret.train.evaluation import evaluate
from turret.train.linear_start import PENALTIES, cross_validated, draws_of, solve
from turret.train.preflight import measure

FRESH = ("classifier.bias", "classifier.weight")
METHODS = ("lora", "prefix", "full", "head")
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STILL = {"train__lr": 1e-9, "train__max_steps": 1, "train__evaluate": "never"}  # what is measured is the start


def dataset(hidden: bool = False) -> Dataset:
    """hidden: the word that tells is anywhere in a text: the mean of the tokens shows it better than the first."""
    data = tiny.dataset(train=48, test=24)
    if not hidden:
        return data
    draw, train = random.Random(0), []
    for number in range(96):
        words = [draw.choice(tiny.PLAIN) for _ in range(6)]
        told = draw.choice(("great", "pleasure", "quick") if number % 2 else ("dull", "boring", "lazy"))
        words.insert(draw.randrange(7), told)
        train.append(Labelled(" ".join(words), "good" if number % 2 else "bad"))
    return replace(data, train=train)


def trained(
    folder: Path | None = None,
    fresh: tuple[str, ...] = FRESH,
    *,
    hidden: bool = False,
    quiet: bool = False,
    **changes: Any,
) -> Any:
    """(base, task, data, what `fit` returned), still attached. quiet: the base has no dropout."""
    on, data = tiny.base("bert", **(QUIET if quiet else {})), dataset(hidden)
    on.fresh = fresh
    made = tiny.recipe(**changes)
    task = tiny.task_of(made, data, on)
    return on, task, data, tiny.train(fit(made, on, task, data, folder=folder))[1]


def weights(fitted: Any) -> dict[str, torch.Tensor]:
    return {**fitted.adapter.tensors, **fitted.adapter.head}


def clouds(classes: int, count: int = 120, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) of different scales, and classes (N,) that they tell in part."""
    draw = torch.Generator().manual_seed(classes)
    y = torch.arange(count) % classes
    middles = torch.randn(classes, width, generator=draw)
    x = middles[y] + 1.5 * torch.randn(count, width, generator=draw)
    return x * torch.logspace(-3, 2, width) + 5, y


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_solution_is_that_of_scikit_learn(classes: int, penalty: float) -> None:
    x, y = clouds(classes)
    weight, bias = solve(x, y, F.cross_entropy, penalty, classes)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    # two classes have one row of weights there, and two here, of opposite sign and half the penalty each
    strength = 1 / (len(x) * penalty) * (2 if classes == 2 else 1)
    known = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(z, y)
    ours = (x @ weight.T + bias).softmax(-1).numpy()
    assert np.abs(ours - known.predict_proba(z)).max() < 2e-3
    random = torch.randn(classes, x.shape[1]) / x.std(0)
    assert np.abs((x @ random.T).softmax(-1).numpy() - known.predict_proba(z)).max() > 0.1, "the control"


def test_cross_validation_takes_a_large_penalty_for_noise_and_a_small_one_for_a_clear_signal() -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    clear, noise = F.one_hot(y).float() * 4, torch.randn(90, 20, generator=draw)
    of_noise, guessing = cross_validated(noise, y, F.cross_entropy, 3)
    of_clear, loss = cross_validated(torch.cat([clear, noise], dim=1), y, F.cross_entropy, 3)
    assert of_noise == PENALTIES[0]
    assert of_clear < PENALTIES[0]
    assert loss < 0.5 < 1.0 < guessing


def test_classes_of_one_or_two_examples_do_not_make_the_penalty_large() -> None:
    """A held-out row of a class that the other folds lack is lost anyway. Counted, it favours an empty head."""
    draw = torch.Generator().manual_seed(0)
    middles = torch.randn(60, 40, generator=draw)

    def cloud(y: torch.Tensor) -> torch.Tensor:
        return middles[y] + 0.5 * torch.randn(len(y), 40, generator=draw)

    y = torch.cat([torch.arange(60), torch.arange(20), torch.arange(5).repeat(4)])  # 40 classes have one row
    x, fresh = cloud(y), cloud(torch.arange(60))
    right = []
    for penalty in (cross_validated(x, y, F.cross_entropy, 60)[0], PENALTIES[0]):
        weight, bias = solve(x, y, F.cross_entropy, penalty, 60)
        right.append(float(((fresh @ weight.T + bias).argmax(1) == torch.arange(60)).float().mean()))
    assert right[0] > 0.95
    assert right[1] < 0.2, "the control: with the largest penalty the frequent classes win"


def share_right(
    x: torch.Tensor, fresh: torch.Tensor, y: torch.Tensor, classes: int, draws: int, draw: torch.Generator
) -> float:
    """The share of fresh rows that are classified well by a solution of rows that are read with dropout."""
    read = torch.cat([x * (torch.rand(x.shape, generator=draw) > 0.5) / 0.5 for _ in range(draws)])
    wanted = y.repeat(draws)
    penalty, _ = cross_validated(read, wanted, F.cross_entropy, classes, draws)
    weight, bias = solve(read, wanted, F.cross_entropy, penalty, classes)
    return float(((fresh @ weight.T + bias).argmax(1) == y).float().mean())


def test_few_examples_are_read_with_several_draws_of_dropout() -> None:
    """One draw of 60 examples is fitted as if its noise told something. Many examples are read once."""
    assert [draws_of(count, 20) for count in (1, 60, 200, 599, 600, 10_000)] == [600, 10, 3, 2, 1, 1]
    draw = torch.Generator().manual_seed(0)
    middles = torch.randn(20, 40, generator=draw)
    y = torch.arange(60) % 20
    x, fresh = (middles[y] + 1.0 * torch.randn(60, 40, generator=draw) for _ in range(2))
    one, several = (share_right(x, fresh, y, 20, draws, draw) for draws in (1, draws_of(len(x), 20)))
    assert several > one + 0.05, "the control: one draw"


def test_many_classes_are_read_with_more_draws_of_dropout() -> None:
    """A thousand examples of 150 classes are seven of each: one draw of them is noise too."""
    assert [draws_of(count, 150) for count in (1, 200, 1000, 3750, 10_000)] == [3750, 19, 4, 1, 1]
    assert draws_of(4000, 1000) == 2, "no more than 10,000 rows in all"
    draw = torch.Generator().manual_seed(0)
    middles = torch.randn(100, 40, generator=draw)
    y = torch.arange(700) % 100
    x, fresh = (middles[y] + 1.0 * torch.randn(700, 40, generator=draw) for _ in range(2))
    assert draws_of(len(x), 20) == 1
    one, several = (share_right(x, fresh, y, 100, draws, draw) for draws in (1, draws_of(len(x), 100)))
    assert several > one + 0.03, "the control: one draw"


def test_draws_of_one_example_are_in_one_fold() -> None:
    """Rows of pure noise that are there three times: across folds, a small penalty would find each again."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 40, generator=draw).repeat(3, 1), (torch.arange(60) % 2).repeat(3)
    assert cross_validated(x, y, F.cross_entropy, 2, draws=3)[0] == PENALTIES[0]
    assert cross_validated(x, y, F.cross_entropy, 2)[0] < PENALTIES[0], "the control: each row is an example"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_new_head_starts_at_the_linear_solution_with_every_method(method: str) -> None:
    accuracies = []
    for fresh in (FRESH, ()):
        on, task, data, fitted = trained(fresh=fresh, quiet=True, method=method, **STILL)
        accuracies.append(evaluate(fitted.model, task, data.train)[0]["accuracy"])
        assert ("head_start" in fitted.adapter.lineage) == bool(fresh)
        adapters.detach(on.model)
    assert accuracies[0] >= 0.9
    assert accuracies[1] <= 0.7, "the control: a head of the checkpoint, here a random one, is left as it is"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"task__multi_label": "true"}, {"task__class_weights": "balanced"}])
def test_many_labels_and_weights_of_classes_have_their_solution_too(settings: dict[str, str]) -> None:
    on, data = tiny.base("bert", **QUIET), tiny.dataset(train=48)
    on.fresh = FRESH
    made = tiny.recipe(**settings, **STILL)
    if made.task.multi_label:
        data = replace(data, train=[Labelled(each.text, (each.label,)) for each in data.train])
    task = tiny.task_of(made, data, on)
    _, fitted = tiny.train(fit(made, on, task, data))
    assert evaluate(fitted.model, task, data.train)[0]["accuracy"] >= 0.9
    adapters.detach(on.model)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_the_adapter_first_learns_to_give_the_head_the_mean_of_the_tokens(method: str) -> None:
    """With a step of no size it learns nothing of it: the control."""
    losses = []
    for lr in ({"lora": 1e-2, "prefix": 3e-2, "full": 1e-3}[method], 1e-9):
        settings = {"train__lr": lr, "train__epochs": 5, "train__evaluate": "never"}
        on, *_, fitted = trained(hidden=True, method=method, **settings)
        said = fitted.adapter.lineage["head_start"]
        assert said["mean_steps"] == 120, "twice as many as the training has steps"
        losses.append(said["mean_loss"])
        adapters.detach(on.model)
    assert losses[0] < 0.6 * losses[1]


@pytest.mark.slow
def test_the_start_of_the_head_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_start, "SAY_SECONDS", 0.0)
    on, data, lines = tiny.base("bert"), dataset(hidden=True), list[str]()
    on.fresh = FRESH
    made = tiny.recipe(method="lora", train__lr=1e-2, train__epochs=5, train__evaluate="never")
    steps = fit(made, on, tiny.task_of(made, data, on), data, say=lines.append)
    next(steps)
    steps.close()
    assert lines[0] == "computing the linear solution that the head starts with"
    assert len(lines) == 121
    assert lines[60].endswith("the head starts with: 60 of 120 steps")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
@pytest.mark.parametrize("after", [2, 5])
def test_a_training_stopped_after_its_start_ends_in_the_same_weights(tmp_path: Path, method: str, after: int) -> None:
    changes = {"method": method, "train__lr": 1e-2, "train__checkpoint_every": 1}
    on, _, _, whole = trained(tmp_path / "whole", hidden=True, **changes)
    adapters.detach(on.model)
    on, data, made = tiny.base("bert"), dataset(hidden=True), tiny.recipe(**changes)
    on.fresh = FRESH
    steps = fit(made, on, tiny.task_of(made, data, on), data, folder=tmp_path / "cut")
    for _ in range(after + 1):  # the checkpoint of a step is written when the next one is asked for
        next(steps)
    steps.close()
    on, _, _, resumed = trained(tmp_path / "cut", hidden=True, **changes)
    adapters.detach(on.model)
    assert resumed.resumed_from == after
    assert weights(whole).keys() == weights(resumed).keys()
    assert all(torch.equal(each, weights(resumed)[name]) for name, each in weights(whole).items())
    assert whole.adapter.lineage["head_start"] == resumed.adapter.lineage["head_start"]
    assert whole.adapter.lineage["head_start"]["mean_steps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_the_first_step_is_no_worse_than_guessing_with_dropout(method: str) -> None:
    """The features of this base vary less than its dropout: a solution without dropout has a loss of 10 and more."""
    on, data = tiny.base("bert"), dataset(hidden=True)
    on.fresh = FRESH
    made = tiny.recipe(method=method, train__evaluate="never")
    records, _ = tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
    adapters.detach(on.model)
    assert records[0].loss < 0.9


@pytest.mark.slow
def test_where_the_first_token_tells_as_much_the_adapter_begins_at_once() -> None:
    """Here both tell nothing: the labels are drawn. With the labels of the texts the adapter learns the mean."""
    for drawn in (True, False):
        draw, on, data = random.Random(0), tiny.base("bert"), dataset(hidden=True)
        on.fresh = FRESH
        if drawn:
            data = replace(data, train=[replace(each, label=draw.choice(("bad", "good"))) for each in data.train])
        made = tiny.recipe(**STILL)
        _, fitted = tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
        adapters.detach(on.model)
        assert ("mean_steps" in fitted.adapter.lineage["head_start"]) != drawn


@pytest.mark.slow
def test_a_plan_counts_the_time_of_the_start() -> None:
    """In processor time: other programs run on this machine."""
    made = tiny.recipe(train__epochs=20, train__lr=2e-3, train__evaluate="never")
    told, spent = [], 0.0
    for fresh in (FRESH, ()):
        on, data = tiny.base("bert"), dataset(hidden=True)
        on.fresh = fresh
        task, schedule = tiny.task_of(made, data, on), Schedule.of(made, len(data.train))
        cost = measure(made, on, task, EncodedRows(task, data.train), schedule, clock=time.process_time)
        told.append(cost.head_start)
        row = next(each for each in plan(made, on, task, data).checks if each.name == "time")
        assert ("before the first step, for the start of the head" in row.text) == bool(fresh)
        if fresh:
            begun, steps = time.process_time(), fit(made, on, task, data)
            next(steps)
            spent = time.process_time() - begun
            steps.close()
    assert told[1] == 0.0, "the control: a head of the checkpoint has no start"
    assert spent / 2 < told[0] < 3 * spent


@pytest.mark.slow
def test_the_start_is_the_same_again_and_a_seed_still_matters() -> None:
    found = []
    for seed in (1, 1, 2):
        on, _, _, fitted = trained(seed=seed)
        found.append(weights(fitted))
        adapters.detach(on.model)
    assert all(torch.equal(each, found[1][name]) for name, each in found[0].items())
    assert not any(torch.equal(each, found[2][name]) for name, each in found[0].items())


def test_the_random_numbers_of_the_program_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    on, *_ = trained(**STILL)
    adapters.detach(on.model)
    assert torch.equal(torch.rand(4), expected)


def test_a_rate_that_breaks_the_start_is_named() -> None:
    on, data = tiny.base("bert"), dataset(hidden=True)
    on.fresh = FRESH
    made = tiny.recipe(train__lr=1e30, train__epochs=3)
    with pytest.raises(LossNotFinite, match=r"at step 0, where the head starts: set train.lr to 0.001 \(now 1e\+30\)"):
        tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
    assert on.model(torch.tensor([[2, 7, 3]])).logits.isfinite().all(), "the base is left as it was"
