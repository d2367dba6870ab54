"""The defaults of a training: documented, filled in, and good enough to learn with."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import small_models
import tiny_training as tiny
import torch
from entered import watching
from tiny_training import fit

from turret import Workspace, adapters
from turret import train as trainer
from turret.data import Labelled
from turret.errors import TrainingError
from turret.methods import Full, Head, LoRA, Method, Peft, Prefix
from turret.methods.method import FEWEST_EPOCHS, LARGE_BASE, MOST_EPOCHS
from turret.recipe import Recipe
from turret.train import fill_recipe
from turret.train.evaluation import evaluate
from turret.train.initialize import attach
from turret.train.training_plan import Plan

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "recipe.md"
DOCUMENTED: dict[str, tuple[Method, str]] = {
    "`lora`": (LoRA(), "decoder"),
    "`prefix` of an encoder": (Prefix(), "encoder"),
    "`prefix` of a decoder or an encoder-decoder": (Prefix(), "decoder"),
    "`head`": (Head(), "encoder"),
    "`full`": (Full(), "decoder"),
    "`peft`": (Peft(peft_type="DORA"), "decoder"),
}


def test_the_documented_defaults_are_those_of_the_code() -> None:
    text = REFERENCE.read_text("utf-8")
    number = r" ([0-9e-]+) \|"
    rows = re.findall(rf"^\| (`[a-z]+`[^|]*) \|{number * 5}$", text, re.MULTILINE)
    said = {name.strip(): tuple(map(float, numbers)) for name, *numbers in rows}
    known = {
        name: (
            method.defaults(kind, "classify").lr,
            method.defaults(kind, "classify", parameters=LARGE_BASE).lr,
            method.defaults(kind, "classify").head_lr_ratio or 1,
            method.defaults(kind, "classify").steps,
            method.defaults(kind, "generate").steps,
        )
        for name, (method, kind) in DOCUMENTED.items()
    }
    assert said == known
    assert f"at least {FEWEST_EPOCHS} and at most {MOST_EPOCHS}" in text


def test_some_of_pefts_methods_have_a_rate_of_their_own() -> None:
    lora, ia3, vera = (Peft(peft_type=each).defaults("encoder", "classify").lr for each in ("DORA", "IA3", "VERA"))
    assert (lora, ia3, vera) == (1e-3, 3e-3, 4e-3)


def test_a_prefix_without_its_mlp_has_a_rate_of_its_own_by_family() -> None:
    flat, through = Prefix(reparametrize=False), Prefix(reparametrize=True)
    assert [flat.defaults(kind, "classify").lr for kind in ("encoder", "decoder")] == [3e-2, 1e-2]
    assert [through.defaults(kind, "classify").lr for kind in ("encoder", "decoder")] == [1e-3, 1e-3]


@pytest.mark.parametrize(
    ("method", "examples", "epochs"),
    [
        ("lora", 200, 20),
        ("lora", 2000, 3),
        ("prefix", 200, 20),
        ("prefix", 1000, 5),
        ("full", 200, 10),
        ("lora", 8, 20),
    ],
)
def test_few_examples_are_read_more_often(method: str, examples: int, epochs: int) -> None:
    made = fill_recipe(Recipe(name="t", base="b", data="t.csv", method=method), tiny.base("bert"), "classify", examples)
    assert made.train.epochs == epochs
    assert made.train.lr is not None
    assert fill_recipe(made, tiny.base("bert"), "classify", 10**6) == made  # what was filled in stays


@pytest.mark.parametrize(
    ("method", "outputs", "epochs"), [("lora", 10, 4), ("lora", 11, 8), ("prefix", 150, 5), ("full", 150, 3)]
)
def test_lora_reads_the_examples_of_many_classes_more_often(method: str, outputs: int, epochs: int) -> None:
    on = tiny.base("bert")
    on.model.config.num_labels = outputs
    made = fill_recipe(Recipe(name="t", base="b", data="t.csv", method=method), on, "classify", 1000)
    assert made.train.epochs == epochs


def test_a_pair_of_texts_is_read_three_times() -> None:
    made = fill_recipe(Recipe(name="t", base="b", data="t.csv"), tiny.base("llama", "generate"), "summarize", 200)
    assert made.train.epochs == 3


def test_what_a_recipe_states_is_kept() -> None:
    stated = {"method": {"kind": "prefix", "reparametrize": True}, "train": {"epochs": 2, "lr": 1e-3}}
    made = Recipe.model_validate({"name": "t", "base": "b", "data": "t.csv", **stated})
    assert fill_recipe(made, tiny.base("bert"), "classify", 24) == made
    assert Recipe.from_toml(made.to_toml()) == made


def test_a_head_beside_lora_moves_faster_unless_the_recipe_states_a_rate() -> None:
    def ratio(**train: object) -> float | None:
        made = Recipe.model_validate({"name": "t", "base": "b", "data": "t.csv", "train": train})
        after = fill_recipe(made, tiny.base("bert"), "classify", 24)
        assert fill_recipe(after, tiny.base("bert"), "classify", 24) == after
        found: float | None = after.train.head_lr_ratio
        return found

    assert [ratio(), ratio(lr="auto"), ratio(lr=1e-3), ratio(lr=1e-3, head_lr_ratio=3.0)] == [10, 10, None, 3]
    pairs = fill_recipe(Recipe(name="t", base="b", data="t.csv"), tiny.base("llama", "generate"), "summarize", 24)
    assert pairs.train.head_lr_ratio is None


@pytest.mark.slow
def test_the_head_alone_moves_at_its_ratio() -> None:
    """The first step of Adam moves every weight by its rate."""
    moved = {}
    for ratio in (1.0, 10.0):
        on, data = tiny.base("bert"), tiny.dataset(train=8)
        steady = {"train__epochs": 1, "train__warmup": 0, "train__schedule": "constant"}
        made = tiny.recipe(**steady, train__lr=1e-3, train__head_lr_ratio=ratio)
        before = dict(on.model.named_parameters())["classifier.bias"].clone()
        _, fitted = tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
        head = float((fitted.adapter.head["classifier.bias"] - before).abs().max())
        factors = max(float(each.abs().max()) for name, each in fitted.adapter.tensors.items() if "lora_B" in name)
        moved[ratio] = (head, factors)
        adapters.detach(on.model)
    assert moved[1.0] == pytest.approx((1e-3, 1e-3), rel=0.01)
    assert moved[10.0] == pytest.approx((1e-2, 1e-3), rel=0.01)


# --- filled in once ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lr", [None, "auto"])
def test_a_recipe_on_its_way_to_a_version_is_filled_once(tmp_path: Path, lr: str | None) -> None:
    rows = tiny.labelled(104)
    table = tmp_path / "reviews.csv"
    table.write_text("text,label\n" + "".join(f"{each.text} {place},{each.label}\n" for place, each in enumerate(rows)))
    recipe = Recipe(
        name="reviews",
        base=str(small_models.save_base("bert", tmp_path / "bert")),
        data={"source": str(table), "test": 8},
        task={"max_tokens": 16},
        train={"lr": lr, "batch_size": 8, "max_steps": 40 if lr else 2, "evaluate": "never"},
    )
    workspace = Workspace(tmp_path / "store")
    with watching() as entered:
        entered.on = True
        result = workspace.train(recipe, fresh=True)
        times = entered.of(fill_recipe)
        planned = workspace.plan(recipe).recipe
    assert times == 1
    assert entered.of(fill_recipe) == 2  # the control: a plan on its own fills its recipe too
    stored = Recipe.from_toml(workspace.run(result.run)["recipe"])
    assert (stored.train.epochs, stored.train.head_lr_ratio) == (planned.train.epochs, planned.train.head_lr_ratio)
    assert isinstance(stored.train.lr, float)


@pytest.mark.parametrize("missing", ["lr", "epochs"])
def test_a_recipe_whose_defaults_are_not_filled_in_is_refused(missing: str) -> None:
    on, data = tiny.base("bert"), tiny.dataset()
    made = tiny.recipe(train__lr=1e-3)
    task = tiny.task_of(made, data, on)
    unfilled = made.model_copy(update={"train": made.train.model_copy(update={missing: None})})

    def plan(recipe: Recipe) -> Plan:
        return trainer.plan(recipe, on, task, data, measured=False)  # type: ignore[arg-type]

    for function in (
        lambda: next(trainer.fit(unfilled, on, task, data)),  # type: ignore[arg-type]
        lambda: trainer.find_rate(unfilled, on, task, data),  # type: ignore[arg-type]
        lambda: plan(unfilled),
    ):
        with pytest.raises(TrainingError, match=rf"^train.{missing} is not set: fill in the recipe's defaults first"):
            function()
    assert plan(made).lr == 1e-3  # the control


def test_auto_is_left_to_the_trials() -> None:
    made = Recipe.model_validate({"name": "t", "base": "b", "data": "t.csv", "train": {"lr": "auto"}})
    assert fill_recipe(made, tiny.base("bert"), "classify", 24).train.lr == "auto"


@pytest.mark.parametrize("preset", ["book-lora", "book-prefix"])
def test_the_textbooks_values_stay_the_textbooks(preset: str) -> None:
    made = Recipe.load(preset)
    on = tiny.base("bert") if preset == "book-lora" else tiny.base("t5", "generate")
    after = fill_recipe(made, on, "classify" if preset == "book-lora" else "summarize", 10)
    assert after.train == made.train
    assert after.method.model_dump(exclude={"reparametrize"}) == made.method.model_dump(exclude={"reparametrize"})


@pytest.mark.parametrize(("family", "chosen"), [("bert", False), ("llama", True), ("t5", True)])
def test_a_prefix_is_trained_through_its_mlp_unless_the_base_is_an_encoder(family: str, chosen: bool) -> None:
    on = tiny.base(family, "classify" if family == "bert" else "generate")
    attached = adapters.attach(on.model, Prefix(num_virtual_tokens=4))
    _, _, method = adapters.extract(attached)
    assert method == Prefix(num_virtual_tokens=4, reparametrize=chosen)
    adapters.detach(on.model)


@pytest.mark.parametrize(("family_kind", "warned"), [("encoder", True), ("decoder", False)])
def test_a_width_of_an_mlp_that_is_not_there_is_told(family_kind: str, warned: bool) -> None:
    found = [each.name for each in Prefix(encoder_hidden_size=64).on(family_kind).checks(family_kind)]
    assert ("encoder_hidden_size" in found) == warned
    assert "encoder_hidden_size" not in [each.name for each in Prefix().on(family_kind).checks(family_kind)]


@pytest.mark.parametrize(("reparametrize", "most"), [(None, 1.01), (True, 1000.0)])
def test_a_step_moves_the_keys_and_values_of_an_encoder_by_the_rate(reparametrize: bool | None, most: float) -> None:
    """Through the MLP a step of Adam at 1e-3 moves them by up to 0.3, all virtual tokens together: the control."""
    on, data = tiny.base("bert"), tiny.dataset(train=8)
    made = tiny.recipe(method="prefix", train__epochs=1, train__warmup=0)
    made = made.model_copy(update={"method": Prefix(reparametrize=reparametrize)})
    attach(fill_recipe(made, on, "classify", 8), on, tiny.task_of(made, data, on))
    before, _, _ = adapters.extract(on.model)
    adapters.detach(on.model)
    records, fitted = tiny.train(fit(made, on, tiny.task_of(made, data, on), data))
    moved = max(float((fitted.adapter.tensors[name] - before[name]).abs().max()) for name in before)
    rate = records[0].lr
    assert moved <= most * rate
    assert (moved > 50 * rate) == (reparametrize is True)
    adapters.detach(on.model)


@pytest.mark.slow
def test_at_its_own_rate_and_shape_an_encoders_prefix_leaves_guessing() -> None:
    """One label of five is wrong, so gradients are noisy: through the MLP it had 0.67 of the clean test set."""
    torch.manual_seed(0)
    chance = random.Random(0)
    data = tiny.dataset(train=800, test=100)
    other = {"good": "bad", "bad": "good"}
    rows = [Labelled(each.text, each.label if chance.random() > 0.2 else other[each.label]) for each in data.train]
    data, on = replace(data, train=rows), tiny.base("bert", num_hidden_layers=8)
    few = {"epochs": 3}  # a third of the default's steps, to save time
    made = Recipe.model_validate(
        {"name": "t", "base": "b", "data": "t.csv", "seed": 1, "method": "prefix", "train": few}
    )
    task = tiny.task_of(made, data, on)
    _, fitted = tiny.train(fit(made, on, task, data))
    assert evaluate(fitted.model, task, data.test)[0]["accuracy"] > 0.9
    adapters.detach(on.model)
