"""A training from a stored version starts with its weights, resumes bit by bit, and names its parent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from tiny_training import find_rate, fit, plan

from turret import adapters, bundles
from turret.adapters import StoredAdapter
from turret.errors import AdapterError, TrainingError, WrongBase
from turret.train.checkpoint import step_of

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method__lora_dropout": 0.3},
    "prefix": {"method__kind": "prefix", "method__num_virtual_tokens": 4, "method__encoder_hidden_size": 16},
    "full": {"method__kind": "full"},
}


def begun(start: StoredAdapter, folder: Path | None = None, on: Any = None, **settings: Any) -> Any:
    """(base, steps) of a training that starts from it."""
    made = tiny.recipe(train__init_from=start.version, train__checkpoint_every=2, train__epochs=1, **settings)
    on, data = on or tiny.base("bert"), tiny.dataset()
    return on, fit(made, on, tiny.task_of(made, data, on), data, folder=folder, start=start)


@pytest.fixture(scope="module", params=list(METHODS))
def parent(request) -> tuple[StoredAdapter, dict[str, Any]]:
    settings = METHODS[request.param]
    made, on, data = tiny.recipe(train__epochs=1, train__lr=3e-3, **settings), tiny.base("bert"), tiny.dataset()
    _, fitted = tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
    return StoredAdapter("tiny@1", "sha256:parent", fitted.adapter), settings


def weights(fitted: Any) -> dict[str, torch.Tensor]:
    return {**fitted.adapter.tensors, **fitted.adapter.head}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(each, other[name]) for name, each in one.items())


def test_it_names_its_parent_and_what_it_was_made_with(parent) -> None:
    start, settings = parent
    _, steps = begun(start, **settings)
    _, fitted = tiny.train(steps)
    lineage = fitted.adapter.lineage
    assert lineage["parent"] == "sha256:parent"
    assert 'init_from = "tiny@1"' in lineage["recipe"]
    assert (lineage["seed"], lineage["data"], lineage["base"]) == (42, "sha256:tiny", "sha256:small")
    assert lineage["tokenizer"].startswith("sha256:")
    assert {"python", "turret", "torch", "transformers", "tokenizers", "safetensors"} <= set(lineage["libraries"])
    assert "parent" not in start.adapter.lineage


@pytest.mark.slow
def test_with_a_rate_of_next_to_nothing_it_ends_where_the_other_ended(parent) -> None:
    """The control: a training from the base does not."""
    start, settings = parent
    _, steps = begun(start, **settings, train__lr=1e-12)
    _, fitted = tiny.train(steps)
    for name, each in weights(fitted).items():
        assert torch.allclose(each, {**start.adapter.tensors, **start.adapter.head}[name], atol=1e-6), name
    made, on, data = tiny.recipe(**settings, train__lr=1e-12, seed=7), tiny.base("bert"), tiny.dataset()
    _, anew = tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
    assert any(not torch.allclose(each, weights(fitted)[name], atol=1e-6) for name, each in weights(anew).items())


@pytest.mark.slow
def test_stopped_and_gone_on_it_ends_as_the_one_that_was_not(parent, tmp_path) -> None:
    start, settings = parent
    on, steps = begun(start, tmp_path, **settings)
    for _ in range(3):  # the checkpoint of step 2 is written before step 3 is yielded
        next(steps)
    steps.close()
    assert step_of(tmp_path) == 2
    _, resumed = tiny.train(begun(start, tmp_path, on=on, **settings)[1])
    assert resumed.resumed_from == 2
    _, whole = tiny.train(begun(start, **settings)[1])
    assert same(weights(resumed), weights(whole))
    assert resumed.adapter.lineage == whole.adapter.lineage


def test_a_checkpoint_of_a_training_from_another_parent_is_refused(parent, tmp_path) -> None:
    start, settings = parent
    on, steps = begun(start, tmp_path, **settings)
    for _ in range(3):
        next(steps)
    steps.close()
    with pytest.raises(TrainingError, match="belongs to another run: its parent"):
        begun(replace(start, digest="sha256:other"), tmp_path, on=on, **settings)[1].__next__()


def test_a_bundle_of_it_reads_back_with_its_parent(parent, tmp_path) -> None:
    start, settings = parent
    _, fitted = tiny.train(begun(start, **settings)[1])
    bundles.save_bundle(fitted.adapter, tmp_path / "bundle")
    read = bundles.read_bundle(tmp_path / "bundle")
    assert read.lineage == fitted.adapter.lineage
    assert same({**read.tensors, **read.head}, weights(fitted))


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"base": adapters.BaseInfo("other", "sha256:other")}, WrongBase, "was trained on base sha256:other"),
        ({"task": {"kind": "summarize"}}, AdapterError, "its task is summarize, this one's classify"),
        (
            {"task": {"kind": "classify", "labels": ["good", "bad"]}},
            AdapterError,
            "its labels are good, bad, this task's",
        ),
        ({"task": {"kind": "classify", "labels": ["x"]}}, AdapterError, "its labels are x, this task's bad, good"),
        ({"tensors": {}}, AdapterError, "it has no "),
    ],
)
def test_what_does_not_fit_is_one_line_for_plan_trials_and_training_and_the_base_is_free(
    change, error, complaint
) -> None:
    made, on, data = tiny.recipe(train__init_from="tiny@1"), tiny.base("bert"), tiny.dataset(train=120)
    task = tiny.task_of(made, data, on)
    _, fitted = tiny.train(fit(tiny.recipe(train__max_steps=1), on, task, data))
    adapters.detach(on.model)
    start = StoredAdapter("tiny@1", "sha256:p", replace(fitted.adapter, **change))
    for call in (
        lambda: next(fit(made, on, task, data, start=start)),
        lambda: plan(made, on, task, data, start=start),
        lambda: find_rate(tiny.recipe(train__init_from="tiny@1", train__epochs=9), on, task, data, start=start),
    ):
        with pytest.raises(error, match=f"training cannot start from tiny@1: .*{complaint}") as refused:
            call()
        assert "\n" not in str(refused.value)
        with pytest.raises(AdapterError, match="nothing is attached"):
            adapters.attachment(on.model)


def test_a_recipe_that_names_a_version_is_never_trained_without_it() -> None:
    made, on, data = tiny.recipe(train__init_from="tiny@1"), tiny.base("bert"), tiny.dataset()
    with pytest.raises(TrainingError, match=r"train\.init_from names tiny@1, and no adapter was given"):
        next(fit(made, on, tiny.task_of(made, data, on), data))
