"""The numbers a training takes where its recipe names none: its method's own. Loads no torch."""

from __future__ import annotations

import math
from typing import Any

from turret.tasks import task_of

FEWEST_EPOCHS, MOST_EPOCHS = 3, 20


def epochs_for(steps: int, examples: int, batch_size: int) -> int:
    """The fewest epochs of so many examples that make so many steps."""
    return math.ceil(steps / math.ceil(examples / batch_size))


def filled(recipe: Any, base: Any, task_kind: str, examples: int) -> Any:
    """The recipe with the numbers it left out: what is trained from here on depends on no default.

    `lr = "auto"` stays until trials have found it.

    Args:
        base: the loaded base.
        examples: how many are trained on.
    """
    method, train = recipe.method.on(base.family.kind), recipe.train
    parameters = sum(each.numel() for each in base.model.parameters())
    own = method.defaults(base.family.kind, classify=not task_of(task_kind).generates, parameters=parameters)
    wanted = epochs_for(own.steps, max(1, examples), train.batch_size)
    epochs = train.epochs or min(MOST_EPOCHS, max(FEWEST_EPOCHS, wanted))
    ratio = None if isinstance(train.lr, float) else own.head_lr_ratio  # a rate that is stated is that of all
    update = {"lr": train.lr or own.lr, "epochs": epochs, "head_lr_ratio": train.head_lr_ratio or ratio}
    return recipe.model_copy(update={"method": method, "train": train.model_copy(update=update)})
