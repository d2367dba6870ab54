"""Random states of a run, separate from the program's.

Dropout draws from torch's global generator, and between steps the training loop yields to code that may draw from it
too. So the loop keeps its own state and swaps it in for each step: neither affects the other.
"""

from __future__ import annotations

import random
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from turret import quantized
from turret.bases import Base
from turret.methods.method import Defaults, Method
from turret.recipe import Recipe
from turret.tasks import task_of

# --- defaults ---------------------------------------------------------------------------------------------------------
# Fills in the training settings that a recipe leaves out with the method's defaults.


def defaults_of(method: Method, base: Base, task_kind: str) -> Defaults:
    """The method's defaults for a task on a base that nothing is attached to."""
    parameters = quantized.count(base.model)
    return method.defaults(base.family.kind, classify=not task_of(task_kind).generates, parameters=parameters)


def filled(recipe: Recipe, base: Base, task_kind: str, examples: int) -> Recipe:
    """The recipe with its missing settings filled in, so that later defaults change nothing in this run.

    `lr = "auto"` stays until trials have found the rate.

    Args:
        base: a base that nothing is attached to.
        examples: number of training examples.
    """
    method, train = recipe.method.on(base.family.kind), recipe.train
    own = defaults_of(method, base, task_kind)
    usual = method.epochs(examples, train.batch_size, classify=not task_of(task_kind).generates)
    ratio = None if isinstance(train.lr, float) else own.head_lr_ratio  # a rate in the recipe is also the head's
    update = {"lr": train.lr or own.lr, "epochs": train.epochs or usual, "head_lr_ratio": train.head_lr_ratio or ratio}
    return recipe.model_copy(update={"method": method, "train": train.model_copy(update=update)})


# --- seeds ------------------------------------------------------------------------------------------------------------


class RandomState(NamedTuple):
    """The states of the generators of Python, torch and the GPU on which the run computes."""

    python: tuple[int, tuple[int, ...], float | None]  # version, words, the pending half of a pair of `random.gauss`
    host: Tensor
    gpu: Tensor | None


class Randomness:
    """`with randomness:` runs the body with the run's random states and then restores the program's."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self._outer: RandomState | None = None
        with self:
            random.seed(seed)
            torch.manual_seed(seed)

    def _take(self) -> RandomState:
        gpu = None
        if self.device.type == "cuda":
            gpu = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            gpu = torch.mps.get_rng_state()
        return RandomState(random.getstate(), torch.get_rng_state(), gpu)

    def _set(self, state: RandomState) -> None:
        random.setstate(state.python)
        torch.set_rng_state(state.host)
        if state.gpu is None:
            return
        if self.device.type == "mps":
            torch.mps.set_rng_state(state.gpu)
        else:
            torch.cuda.set_rng_state(state.gpu, self.device)

    def __enter__(self) -> None:
        assert self._outer is None, "the run's random states are in use already"
        self._outer = self._take()
        if hasattr(self, "_own"):
            self._set(self._own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._outer is not None
        self._own = self._take()
        self._set(self._outer)
        self._outer = None

    def tensors(self) -> dict[str, Tensor]:
        """The states as tensors, for a checkpoint."""
        (version, words, gauss), host, gpu = self._own
        assert version == 3, f"Python's generator has a new state, version {version}"
        assert gauss is None, "random.gauss was called, whose pending number a checkpoint does not keep"
        state = {"python": torch.tensor(words, dtype=torch.int64), "torch": host}
        if gpu is not None:
            state[self.device.type] = gpu
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from the states of a checkpoint."""
        python = (3, tuple(state["python"].tolist()), None)
        self._own = RandomState(python, state["torch"], state.get(self.device.type))
