"""The grammar of --methods, and its error texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret.compare.design import candidates, design, with_equal_epochs
from turret.errors import RecipeError
from turret.methods import Peft
from turret.recipe import Recipe

RECIPE = Recipe(name="tiny", base="small", data="tiny.csv")


def specs(text: str | None, recipe: Recipe = RECIPE, kind: str = "classify") -> list[str]:
    return [each.spec for each in candidates(text, recipe, kind)]


def test_every_task_is_compared_with_the_baselines_that_it_has() -> None:
    assert specs(None) == ["base", "linear", "full", "lora", "prefix"]
    assert specs(None, kind="summarize") == ["base", "lead", "nearest", "full", "lora", "prefix"]
    assert specs(None, kind="generate") == ["base", "nearest", "full", "lora", "prefix"]
    assert specs(None, kind="chat") == ["base", "nearest", "full", "lora", "prefix"]
    with pytest.raises(RecipeError, match="lead: task classify has no such baseline: expected base, linear"):
        specs("lead,full")
    with pytest.raises(RecipeError, match="has no head to train alone"):
        specs("head,full", kind="generate")


def test_settings_follow_their_method_and_numbers_with_slashes_are_rows_of_their_own() -> None:
    assert specs("full,lora:r=4/8,lora_alpha=16,prefix:num_virtual_tokens=10") == [
        "full",
        "lora:r=4,lora_alpha=16",
        "lora:r=8,lora_alpha=16",
        "prefix:num_virtual_tokens=10",
    ]
    found = candidates("lora:r=4,lora_alpha=16,target_modules=query+value", RECIPE, "classify")[0].recipe.method
    assert (found.r, found.lora_alpha, found.target_modules) == (4, 16, ("query", "value"))


def test_lora_plus_is_a_row_beside_plain_lora() -> None:
    rows = candidates("lora,lora:lora_plus_ratio=4/16", RECIPE, "classify")
    assert [row.label for row in rows] == ["lora", "lora lora_plus_ratio=4", "lora lora_plus_ratio=16"]
    assert [getattr(row.recipe.method, "lora_plus_ratio", 0) for row in rows] == [None, 4.0, 16.0]


def test_the_same_row_said_twice_is_one() -> None:
    assert specs("full,lora,lora,full") == ["full", "lora"]


def test_a_method_keeps_the_recipes_own_settings_where_it_is_the_recipes_and_its_rate_too() -> None:
    recipe = RECIPE.with_overrides({"method.r": "2", "train.lr": "5e-4"})
    lora, full, other = candidates("lora,full,lora:r=4", recipe, "classify")
    assert lora.recipe.method.r == 2
    assert lora.recipe.train.lr == 5e-4
    assert full.recipe.train.lr is None, "a rate for LoRA would ruin full fine-tuning"
    assert other.recipe.train.lr == 5e-4


def test_a_rate_can_be_given_to_all_to_one_or_be_found_for_each() -> None:
    assert [each.recipe.train.lr for each in candidates("full,lora", RECIPE, "classify", "auto")] == ["auto", "auto"]
    full, lora = candidates("full,lora:lr=3e-4", RECIPE, "classify", 1e-5)
    assert (full.recipe.train.lr, lora.recipe.train.lr) == (1e-5, 3e-4)


def test_every_method_begins_at_the_base() -> None:
    recipe = RECIPE.with_overrides({"train.init_from": "other@3"})
    assert [each.recipe.train.init_from for each in candidates("full,lora", recipe, "classify")] == [None, None]


def test_a_method_of_peft_is_named_and_its_settings_are_pefts() -> None:
    found = candidates("full,peft:ia3,peft:VERA,r=32/64,target_modules=query+value", RECIPE, "classify")
    assert [each.spec for each in found[1:]] == [
        "peft:IA3",
        "peft:VERA,r=32,target_modules=query+value",
        "peft:VERA,r=64,target_modules=query+value",
    ]
    assert found[1].label == "IA3"
    assert found[2].recipe.method == Peft(peft_type="VERA", r=32, target_modules=["query", "value"])


def test_a_recipe_of_peft_lends_its_settings_and_rate_to_its_own_method_alone() -> None:
    recipe = RECIPE.with_overrides({"method": "peft", "method.peft_type": "VERA", "method.r": "16", "train.lr": "3e-3"})
    own, other, full = candidates("peft,peft:IA3,full", recipe, "classify")
    assert (own.recipe.method, own.recipe.train.lr) == (Peft(peft_type="VERA", r=16), 3e-3)
    assert (other.recipe.method, other.recipe.train.lr) == (Peft(peft_type="IA3"), None)
    assert full.recipe.train.lr is None


def test_the_baseline_is_also_trained_for_the_epochs_of_the_others_where_they_differ() -> None:
    def twins(text: str, against: str = "full") -> list[str]:
        rows = candidates(text, RECIPE, "classify")
        wanted = with_equal_epochs(rows, against, lambda row: row.recipe.train.epochs or 3)
        return [row.spec for row in wanted[len(rows) :]]

    assert twins("full,lora,prefix:epochs=9,prefix:epochs=24") == ["full:epochs=9", "full:epochs=24"]
    assert twins("full,lora,prefix") == [], "the control: nothing differs"
    assert twins("full,full:epochs=9,prefix:epochs=9") == [], "the row is there already"
    assert twins("lora:r=4,prefix:epochs=9", "lora:r=4") == ["lora:r=4,epochs=9"]
    assert twins("linear,prefix:epochs=9", "linear") == [], "a baseline without steps has none to equal"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("qlora", "qlora is not a method to compare: expected base, linear, lead, nearest, full, lora"),
        ("lora:rank=4", "lora:rank=4: "),
        ("lora:r=0", "lora:r=0: method.r"),
        ("r=4,lora", "a setting belongs after its method"),
        ("lora:r", "expected SETTING=VALUE"),
        ("base:r=4", "base is not trained and has no settings"),
        ("peft", "expected one method of PEFT by its name, such as peft:IA3"),
        (",", "no method to compare"),
    ],
)
def test_a_mistake_is_one_line(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as raised:
        specs(text)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.text(alphabet="lorabasefuprix:=,/+0123456789.\n\x00é", max_size=40))
def test_whatever_is_said_is_rows_or_one_clear_line(text: str) -> None:
    found, lines = [], [""]
    try:
        found = specs(text)
    except RecipeError as error:
        lines = str(error).split("\n")
    assert len(lines) == 1
    assert bool(found) != bool(lines[0])
    assert len(set(found)) == len(found)


# --- the design ------------------------------------------------------------------------------------------------------


def designed(methods: str = "base,full,lora", **changes):
    settings = {"seeds": 2, "fractions": (0.1, 1.0), "against": "full", "margin": 1.0, "train": 50} | changes
    recipe = settings.pop("recipe", RECIPE)
    return design(recipe, candidates(methods, recipe, "classify"), **settings)


def test_all_trainings_share_the_split_and_each_size_holds_its_share() -> None:
    cells = list(designed().cells())
    assert {cell.recipe.split_seed for cell in cells} == {42}
    assert {cell.recipe.seed for cell in cells} == {42, 43}
    assert {cell.recipe.data.train for cell in cells} == {None, 5}
    assert [str(cell) for cell in cells if cell.candidate.kind == "base"] == ["base, seed 42", "base, seed 43"]


def test_a_seed_is_done_by_all_methods_before_the_next_begins() -> None:
    seeds = [cell.seed for cell in designed().cells()]
    assert seeds == sorted(seeds)


def test_a_training_has_the_same_folder_whatever_else_is_compared_and_another_when_its_recipe_differs() -> None:
    few = {cell.key for cell in designed("full,lora").cells()}
    many = {cell.key for cell in designed("base,full,lora,lora:r=4", seeds=3).cells()}
    assert few < many
    slower = RECIPE.with_overrides({"train.epochs": "9"})
    assert few.isdisjoint(cell.key for cell in designed("full,lora", recipe=slower).cells())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"margin": 0}, "--margin 0"),
        ({"fractions": (0.0, 1.0)}, "--fractions 0.0"),
        ({"against": "prefix"}, "the baseline is prefix, which is not among the methods"),
    ],
)
def test_a_design_without_sense_is_refused_in_one_line(changes, words) -> None:
    with pytest.raises(RecipeError, match=words):
        designed(**changes)
