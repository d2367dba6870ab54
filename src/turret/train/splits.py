"""The splits of a training: the examples to train on, and those that evaluations during training use."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from turret.data import Dataset, Example
from turret.errors import RecipeError
from turret.recipe import Recipe

CARVED = 0.1  # share of the training examples for validation, if it is needed and not named


@dataclass(frozen=True)
class Splits:
    """The examples to train on, and those that evaluations during training use."""

    train: Sequence[Example]
    watched: Sequence[Example] | None
    watched_name: str | None  # "validation" or "test"
    selects: bool  # whether evaluations choose the weights and stop early: only those on a validation split do
    note: str | None = None  # a decision that the recipe left open


def splits_of(recipe: Recipe, dataset: Dataset) -> Splits:
    """The data set's splits as the recipe uses them. Scores on the test split are reported and never choose."""
    chooses = recipe.train.keep == "best" or recipe.train.early_stopping is not None
    if chooses and recipe.train.evaluate == "never":
        raise RecipeError(
            'train.keep = "best" and train.early_stopping compare evaluations, but train.evaluate is "never": '
            'set train.evaluate to "epoch" or to a number of steps'
        )
    train, validation = dataset.train, dataset.validation
    note = None
    if chooses and not validation:
        if len(train) < 10:
            raise RecipeError(
                f"choosing needs a validation split and {len(train)} training examples are too few to take one from: "
                'name data.validation, or set train.keep to "last" without early_stopping'
            )
        order = list(range(len(train)))
        random.Random(recipe.split_seed).shuffle(order)
        held = max(1, round(CARVED * len(train)))
        train, validation = [train[i] for i in sorted(order[held:])], [train[i] for i in order[:held]]
        note = f"{held} of the training examples are held back as a validation split, because the recipe names none"
    if validation:
        return Splits(train, validation, "validation", selects=True, note=note)
    if dataset.test:
        return Splits(train, dataset.test, "test", selects=False)
    return Splits(train, None, None, selects=False)
