"""`lr = "auto"` carried out: the same short training at one rate after another, scored on examples held back from it.

Knows the pieces of the loop, and leaves the base as it was. Which rates are tried, and which is taken, `rates` says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from turret import adapters
from turret.errors import LossNotFinite
from turret.train.batches import Items, Schedule, pass_tokens
from turret.train.defaults import filled
from turret.train.evaluation import example_losses
from turret.train.initialize import InitialAdapter, attach, optimiser_of
from turret.train.optim import AdamW, learning_rate
from turret.train.rates import Found, Score, search, size_of
from turret.train.seeds import Randomness
from turret.train.splits import splits_of
from turret.train.step import explained, train_step

RISING = 0.25  # of a trial's steps
LOST = 2.0  # times the loss before training: a trial whose latest losses are above that has diverged
LATEST = 4  # losses whose mean tells


def find_rate(
    recipe: Any,
    base: Any,
    task: Any,
    dataset: Any,
    *,
    start: InitialAdapter | None = None,
    on_trial: Callable[[float, int], None] | None = None,
) -> Found:
    """The rate to train `recipe` with on a loaded base, from its training split alone.

    Of recipe, data and base alone, so a run that was killed finds the same rate again. on_trial hears of every rate and
    the steps it is tried for, before it is.
    """
    examples = splits_of(recipe, dataset).train
    recipe = filled(recipe, base, task.kind, len(examples))
    parameters = sum(each.numel() for each in base.model.parameters())
    default = recipe.method.defaults(base.family.kind, classify=not task.generates, parameters=parameters).lr
    train = recipe.train
    run = Schedule(len(examples), train.batch_size, train.epochs, recipe.seed, train.max_steps)
    size = size_of(len(examples), run.steps)
    if size.reason is not None:
        return Found(default, default, size, {})
    with trials(recipe, base, task, examples, steps=size.steps, held=size.held, start=start) as tried:

        def score(lr: float) -> Score | None:
            if on_trial is not None:
                on_trial(lr, size.steps)
            return tried.score(lr)

        lr, scores = search(default, score)
    losses = {rate: None if found is None else found.mean for rate, found in sorted(scores.items())}
    return Found(lr, default, size, losses)


@dataclass(frozen=True)
class Trials:
    """Trainings of `steps` steps that may follow each other on one attached adapter."""

    recipe: Any
    base: Any
    task: Any
    items: Items
    held: Items
    steps: int
    optimiser: AdamW
    start: torch.Tensor  # (N,) the weights that every trial begins with

    def score(self, lr: float) -> Score | None:
        """Train from the start at this rate; the losses of the held-back examples, None where it diverged.

        The rate rises and then stays: a falling one would hide in its last steps what a large rate costs.
        """
        before = self.before
        self._begin_again()
        train, rising = self.recipe.train, max(1, round(RISING * self.steps))
        schedule = Schedule(len(self.items), train.batch_size, self.steps, self.recipe.seed, max_steps=self.steps)
        randomness = Randomness(self.recipe.seed, self.base.model.device)
        losses: list[float] = []
        for step, indices in schedule.batches():
            batch = self.items.take(indices)
            rate = learning_rate(step, total=self.steps, peak=lr, warmup=rising, schedule="constant")
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
                    )
            except LossNotFinite:
                return None
            losses.append(loss)
            if len(losses) > LATEST and sum(losses[-LATEST:]) > LATEST * LOST * before:
                return None
        score = self._held_out()
        return score if score.finite else None

    @cached_property
    def before(self) -> float:
        """The loss of the held-back examples at the start."""
        self._begin_again()
        return self._held_out().mean

    def _begin_again(self) -> None:
        zero = torch.zeros_like(self.start)
        self.optimiser.load_state({"weights": self.start, "exp_avg": zero, "exp_avg_sq": zero}, steps=0)

    def _held_out(self) -> Score:
        return Score(*example_losses(self.base.model, self.task, self.held, most_tokens=self.most_tokens))

    @property
    def most_tokens(self) -> int:
        """Of one pass."""
        return pass_tokens(self.recipe.train, self.base.model.config)


@contextmanager
def trials(
    recipe: Any,
    base: Any,
    task: Any,
    examples: Sequence[Any],
    *,
    steps: int,
    held: int,
    start: InitialAdapter | None = None,
) -> Iterator[Trials]:
    """The recipe's adapter on the base for the length of the block; `held` of the examples are never trained on."""
    order = list(range(len(examples)))
    random.Random(recipe.seed).shuffle(order)
    with Randomness(recipe.seed, base.model.device):
        attach(recipe, base, task, start)
    try:
        base.model.train()
        optimiser = optimiser_of(recipe, base)
        yield Trials(
            recipe,
            base,
            task,
            items=Items(task, [examples[place] for place in sorted(order[held:])]),
            held=Items(task, [examples[place] for place in order[:held]]),
            steps=steps,
            optimiser=optimiser,
            start=optimiser.weights.clone(),
        )
    finally:
        adapters.detach(base.model)
        base.model.eval()
