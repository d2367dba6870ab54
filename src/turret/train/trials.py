"""Runs the trials of `lr = "auto"`: the same short training at several rates, scored on held-out examples.

`rates` decides which rates are tried and which one is chosen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from turret import adapters
from turret.bases import Base
from turret.data import Dataset, Example
from turret.errors import LossNotFinite
from turret.recipe import Recipe
from turret.tasks import Task, has_head
from turret.train.batches import Items, Schedule, pass_tokens
from turret.train.defaults import defaults_of, filled
from turret.train.evaluation import example_losses
from turret.train.initialize import InitialAdapter, attach, optimiser_of
from turret.train.linear_start import head_start
from turret.train.loss_scale import LossScale
from turret.train.optim import AdamW, learning_rate
from turret.train.rates import FoundRate, Score, search, size_of
from turret.train.seeds import Randomness
from turret.train.splits import splits_of
from turret.train.step import explained, train_step

WARMUP = 0.25  # of a trial's steps
DIVERGED = 2.0  # times the loss before training: a trial whose latest losses are above that has diverged
LATEST = 4  # losses in their mean


def find_rate(
    recipe: Recipe,
    base: Base,
    task: Task,
    dataset: Dataset,
    *,
    start: InitialAdapter | None = None,
    on_trial: Callable[[float, int], None] | None = None,
) -> FoundRate:
    """Find the learning rate for a recipe on a loaded base, from the training split alone. The base is left as it was.

    The result depends on recipe, data and base alone, so a run that was killed finds the same rate again.

    Args:
        start: the version that the adapter starts from.
        on_trial: called before each trial with its rate and its number of steps.
    """
    examples = splits_of(recipe, dataset).train
    recipe = filled(recipe, base, task.kind, len(examples))
    default = defaults_of(recipe.method, base, task.kind).lr
    size = size_of(len(examples), Schedule.of(recipe, len(examples)).steps)
    if size.reason is not None:
        return FoundRate(default, default, size, {})
    with trials(recipe, base, task, examples, steps=size.steps, held=size.held, start=start) as tried:

        def score(lr: float) -> Score | None:
            if on_trial is not None:
                on_trial(lr, size.steps)
            return tried.score(lr)

        lr, scores = search(default, score)
    losses = {rate: None if each is None else each.mean for rate, each in sorted(scores.items())}
    return FoundRate(lr, default, size, losses)


@dataclass(frozen=True)
class Trials:
    """Short trainings on one attached adapter, each from the same initial weights."""

    recipe: Recipe
    base: Base
    task: Task
    items: Items
    held: Items
    steps: int
    optimiser: AdamW
    start: torch.Tensor  # (N,) the initial weights

    def score(self, lr: float) -> Score | None:
        """Train from the initial weights at this rate. Returns the held-out losses; None if it diverged.

        The rate rises and then stays. If it fell to zero, the last steps would hide the noise of a large rate.
        """
        before = self.before
        self._reset()
        train, warmup = self.recipe.train, max(1, round(WARMUP * self.steps))
        schedule = Schedule(len(self.items), train.batch_size, self.steps, self.recipe.seed, max_steps=self.steps)
        randomness = Randomness(self.recipe.seed, self.base.model.device)
        losses: list[float] = []
        scale = LossScale.of(self.base.dtype)
        for step, indices in schedule.batches():
            batch = self.items.take(indices)
            rate = learning_rate(step, total=self.steps, peak=lr, warmup=warmup, schedule="constant")
            try:
                with randomness, explained(self.most_tokens, batch, step, None):
                    loss, _ = train_step(
                        self.base.model,
                        self.task,
                        self.optimiser,
                        batch,
                        rate=rate,
                        clip=train.gradient_clip,
                        most_tokens=self.most_tokens,
                        scale=scale,
                    )
            except LossNotFinite:
                return None
            losses.append(loss)
            if len(losses) > LATEST and sum(losses[-LATEST:]) > LATEST * DIVERGED * before:
                return None
        score = self._held_out()
        return score if score.finite else None

    @cached_property
    def before(self) -> float:
        """The loss of the held-out examples with the initial weights."""
        self._reset()
        return self._held_out().mean

    def _reset(self) -> None:
        self.optimiser.restart(self.start)

    def _held_out(self) -> Score:
        return Score(*example_losses(self.base.model, self.task, self.held, most_tokens=self.most_tokens))

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens in one pass."""
        return pass_tokens(self.recipe.train, self.base.model.config)


@contextmanager
def trials(
    recipe: Recipe,
    base: Base,
    task: Task,
    examples: Sequence[Example],
    *,
    steps: int,
    held: int,
    start: InitialAdapter | None = None,
) -> Iterator[Trials]:
    """Trials with the recipe's adapter, which is detached after the block. `held` of the examples only score."""
    default = defaults_of(recipe.method, base, task.kind).lr
    order = list(range(len(examples)))
    random.Random(recipe.seed).shuffle(order)
    with Randomness(recipe.seed, base.model.device):
        attach(recipe, base, task, start)
    try:
        base.model.train()
        optimiser = optimiser_of(recipe, base)
        items = Items(task, [examples[place] for place in sorted(order[held:])])
        if start is None and has_head(task):
            begins = head_start(recipe, base, task, items, pass_tokens(recipe.train, base.model.config))
            if begins is not None:
                begins.begin(optimiser, Randomness(recipe.seed, base.model.device), default, steps)
        yield Trials(
            recipe,
            base,
            task,
            items=items,
            held=Items(task, [examples[place] for place in order[:held]]),
            steps=steps,
            optimiser=optimiser,
            start=optimiser.weights.clone(),
        )
    finally:
        adapters.detach(base.model)
        base.model.eval()
