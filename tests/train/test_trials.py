"""`lr = "auto"` on small random bases: it finds a rate, reads training examples only, and leaves the base as it was."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import tiny_training as tiny
import torch
from tiny_training import find_rate, plan

from turret.data import Labelled
from turret.methods import LoRA
from turret.methods.method import Defaults
from turret.recipe import Recipe
from turret.train.batches import EncodedRows
from turret.train.evaluation import evaluate, example_losses
from turret.train.loop import checksum
from turret.train.lr_finder import Trials
from turret.train.training_plan import FoundRate
from turret.workspace import Workspace

AUTO: dict[str, Any] = {"train__lr": "auto", "train__epochs": 4, "method__lora_dropout": 0.1}  # 60 steps of 8


def found(kind: Any = "classify", family: str = "bert", data: Any = None, **settings: Any) -> tuple[FoundRate, Any]:
    on, made = tiny.base(family, "classify" if kind == "classify" else "generate"), tiny.recipe(**(AUTO | settings))
    data = data or tiny.dataset(kind, train=120)
    return find_rate(made, on, tiny.task_of(made, data, on), data), on


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the method's own rate."""

    def put(rate: float) -> None:
        monkeypatch.setattr(LoRA, "defaults", lambda *_, **__: Defaults(rate, 20))

    return put


def test_a_default_that_is_far_too_small_is_left(default: Any) -> None:
    default(1e-4)
    result, _ = found()
    assert result.lr > result.default
    assert result.losses[result.lr] < result.losses[result.default]  # type: ignore[operator]


def test_a_default_that_diverges_is_left_for_a_smaller_one(default: Any) -> None:
    default(1.0)
    result, _ = found(train__gradient_clip=1e9, train__head_lr_ratio=1)
    assert result.lr < result.default


def test_a_rate_that_makes_the_loss_infinite_is_a_diverged_trial(default: Any) -> None:
    default(1e30)
    result, on = found(train__gradient_clip=1e30)
    assert result.lr == result.default
    assert set(result.losses.values()) == {None}
    assert all(bool(torch.isfinite(each).all()) for each in on.model.parameters())


def test_equal_within_noise_keeps_the_default(default: Any) -> None:
    default(1e-12)  # none of its neighbours moves a weight to speak of
    result, _ = found()
    assert result.lr == result.default
    assert len(result.losses) == 2
    assert "this method's own" in str(result)


def test_the_same_seed_finds_the_same_to_the_last_bit_whatever_the_program_draws() -> None:
    first, _ = found()
    torch.manual_seed(99)
    torch.rand(7)
    assert found()[0] == first
    assert found(seed=7)[0].losses != first.losses


@pytest.mark.parametrize(("kind", "family", "method"), [("classify", "bert", "full"), ("summarize", "llama", "prefix")])
def test_the_base_is_left_bit_for_bit_and_free(kind: Any, family: str, method: str) -> None:
    on = tiny.base(family, "classify" if kind == "classify" else "generate")
    modules = dict(on.model.named_modules())
    before = checksum([*on.model.parameters(), *on.model.buffers()])
    made, data = tiny.recipe(train__lr="auto", train__epochs=4, method=method), tiny.dataset(kind, train=120)
    state = torch.get_rng_state()
    find_rate(made, on, tiny.task_of(made, data, on), data)
    assert checksum([*on.model.parameters(), *on.model.buffers()]) == before
    assert dict(on.model.named_modules()) == modules
    assert not on.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in on.model.parameters())


class Untouchable(list[Any]):
    """A split that must not be read."""

    def __getitem__(self, place: Any) -> Any:
        raise AssertionError("looked at a held-out example")

    def __iter__(self) -> Any:
        raise AssertionError("looked at the held-out examples")


def test_validation_and_test_examples_are_never_looked_at() -> None:
    data = tiny.dataset(train=120, validation=8)
    hidden = replace(data, validation=Untouchable(data.validation), test=Untouchable(data.test))
    assert found(data=hidden)[0].losses


def test_what_scores_is_not_trained_on() -> None:
    data, on, made = tiny.dataset(train=120), tiny.base("bert"), tiny.recipe(**AUTO)
    with closing(Trials(made, on, tiny.task_of(made, data, on), data.train, steps=10, held=24)) as tried:
        held, rest = list(tried.held.examples), list(tried.items.examples)
        assert len(held) == 24
        assert sorted(map(repr, [*held, *rest])) == sorted(map(repr, data.train))
        first, second = tried.score(1e-3), tried.score(1e-2)
        assert first is not None
        assert second is not None
        assert first != second
        assert tried.score(1e-3) == first  # every trial begins anew


@pytest.mark.parametrize(("kind", "family"), [("classify", "bert"), ("summarize", "llama"), ("summarize", "t5")])
def test_the_losses_of_the_examples_add_up_to_the_loss(kind: Any, family: str) -> None:
    data, made = tiny.dataset(kind, train=40), tiny.recipe()
    on = tiny.base(family, "classify" if kind == "classify" else "generate")
    task = tiny.task_of(made, data, on)
    with closing(Trials(made, on, task, data.train, steps=1, held=4)):
        items = EncodedRows(task, data.train)
        losses, weights = example_losses(on.model, task, items, most_tokens=64)
        metrics, _ = evaluate(on.model, task, items)
    assert sum(losses) / sum(weights) == pytest.approx(metrics["loss"], rel=1e-5)


def test_too_little_data_keeps_the_default_and_says_so() -> None:
    result, _ = found(data=tiny.dataset(train=24), train__epochs=40)
    assert result.lr == 1e-3
    assert (
        str(result)
        == "0.001, this method's own: 24 training examples are too few to compare rates; at least 80 are needed"
    )
    result, _ = found(train__max_steps=10)
    assert "10 steps are too few" in result.note()


@pytest.mark.slow
def test_a_plan_alone_says_what_training_will_try() -> None:
    on, made, data = tiny.base("bert"), tiny.recipe(**AUTO), tiny.dataset(train=120)
    told = plan(made, on, tiny.task_of(made, data, on), data)
    rows = {check.name: check for check in told.checks}
    assert rows["learning rate"].text.startswith("auto: training first tries at most")
    assert "to find the learning rate" in rows["time"].text
    assert told.to_json()["rates"] is None
    after = told.with_rate(find_rate(made, on, tiny.task_of(made, data, on), data))
    assert after.lr == after.to_json()["lr"] == after.to_json()["rates"]["lr"]
    assert [check.name for check in after.checks] == [check.name for check in told.checks]


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_auto_trains_with_a_number_that_the_stored_recipe_holds_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    rows = [Labelled(f"{each.text} number {place}", each.label) for place, each in enumerate(tiny.labelled(128))]
    table = tmp_path / "reviews.csv"
    table.write_text("text,label\n" + "".join(f"{each.text},{each.label}\n" for each in rows))
    recipe = Recipe(
        name="reviews",
        base=str(small_models.save_base("bert", tmp_path / "bert")),
        data={"source": str(table), "test": 8},
        task={"max_tokens": 32},
        train={"epochs": 4, "lr": "auto", "evaluate": "never", "checkpoint_every": 5},
    )
    workspace, plans, stages = Workspace(tmp_path / "store"), [], []  # type: ignore[var-annotated]
    assert workspace.plan(recipe).recipe.train.lr == "auto"

    def stop(record: Any) -> None:
        if record.step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workspace.train(recipe, on_record=stop, on_plan=plans.append, on_stage=stages.append)
    result = workspace.train(recipe, on_plan=plans.append)
    assert result.resumed_from == 10
    assert plans[0].plan.found == plans[1].plan.found
    rate = plans[1].recipe.train.lr
    assert rate == plans[1].plan.lr
    assert any("trying the learning rate 0.001" in words for words in stages)
    assert any(note.startswith("learning rates tried") for note in result.notes)
    kept = Recipe.load(workspace.store.root / "runs" / result.run / "recipe.toml")
    assert kept.train.lr == rate
    again = Workspace(tmp_path / "again").train(kept)
    assert again.digest == result.digest
