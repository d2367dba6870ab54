"""What is trained on, what is watched, and whether watching may choose. Knows recipes and data sets, no tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turret.errors import RecipeError

CARVED = 0.1  # of the training examples, where a choice needs a validation split and none is named


@dataclass(frozen=True)
class Splits:
    """`watched` is what evaluations during training look at; only a validation split may select."""

    train: Sequence[Any]
    watched: Sequence[Any] | None
    watched_name: str | None  # "validation" or "test"
    selects: bool
    note: str | None = None  # what was done that the recipe did not say


def splits_of(recipe: Any, dataset: Any) -> Splits:
    """The data set's splits as this recipe uses them. The test split reports, and never chooses."""
    chooses = recipe.train.keep == "best" or recipe.train.early_stopping is not None
    if chooses and recipe.train.evaluate == "never":
        raise RecipeError(
            'train.keep = "best" and train.early_stopping compare evaluations, but train.evaluate is "never": '
            'set train.evaluate to "epoch" or to a number of steps'
        )
    train, validation, test = dataset.train, dataset.validation, dataset.test
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
    if test:
        return Splits(train, test, "test", selects=False)
    return Splits(train, None, None, selects=False)
