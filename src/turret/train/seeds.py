"""The defaults of a run's settings, and its seed where initial weights are drawn.

A training step draws from no generator: see `ops.dropout`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from turret import quantized
from turret.bases import Base
from turret.methods.method import Defaults, Method
from turret.recipe import Recipe
from turret.tasks import task_of

# --- defaults ---------------------------------------------------------------------------------------------------------
# Fills in the training settings that a recipe leaves out with the method's defaults.


def defaults_of(method: Method, base: Base, task_kind: str, *, parameters: int | None = None) -> Defaults:
    """The method's defaults for a task.

    Args:
        parameters: of the base without adapters; None: of a base that nothing is attached to, counted here.
    """
    task = task_of(task_kind)
    count = quantized.count(base.model) if parameters is None else parameters
    own = method.defaults(base.family.kind, task.request, parameters=count)
    return replace(own, lr=own.lr * task.rate_ratio)


def filled(recipe: Recipe, base: Base, task_kind: str, examples: int) -> Recipe:
    """The recipe with its missing settings filled in, so that later defaults change nothing in this run.

    `lr = "auto"` stays until trials have found the rate.

    Args:
        base: a base that nothing is attached to.
        examples: number of training examples.
    """
    method, train = recipe.method.on(base.family.kind), recipe.train
    own = defaults_of(method, base, task_kind)
    usual = method.epochs(examples, train.batch_size, task_of(task_kind).request)
    ratio = None if isinstance(train.lr, float) else own.head_lr_ratio  # a rate in the recipe is also the head's
    update = {"lr": train.lr or own.lr, "epochs": train.epochs or usual, "head_lr_ratio": train.head_lr_ratio or ratio}
    return recipe.model_copy(update={"method": method, "train": train.model_copy(update=update)})


# --- seed -------------------------------------------------------------------------------------------------------------


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the generators of Python, torch and the device begin at a seed; afterwards they are as before."""
    python, module = random.getstate(), getattr(torch, device.type)
    with torch.random.fork_rng(devices=[]):
        own = None if device.type == "cpu" else module.get_rng_state()
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            if own is not None:
                module.set_rng_state(own)
