"""The search for `lr = "auto"`: which learning rates are tried, and which one is chosen.

The rates are 3, 10 and 30 times the default, or else 1/3, 1/10 and 1/30 of it. The search moves outward as long as a
rate is better than the one before. Short trials cannot tell closer rates apart. Better means by two standard errors of
the paired difference over the scored examples. Trials run one after another, because several adapters in one pass save
little (1.24x faster at four adapters, on short texts only).

Short trials favour large rates, which start fast and become noisy later: the best rate falls about as the inverse root
of the number of steps. A trial has a fifth of the run's steps, so the run's best rate is two to three times below the
trial's. That is why a rate above the default is chosen only if the next larger one did no worse. (BBC News: the best
trial of 15 steps is at 1e-2, at which the run of 150 steps ends at chance; at 3e-3 the run beats the default.) A rate
below the default has no such advantage, so it is chosen as it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

from turret.adapters import StoredAdapter
from turret.bases import Base
from turret.data import Dataset, Example
from turret.errors import LossNotFinite
from turret.recipe import Recipe
from turret.tasks import Task
from turret.train.adamw import learning_rate
from turret.train.batches import EncodedRows, Schedule, splits_of
from turret.train.evaluation import example_losses
from turret.train.initialize import defaults_of, recipe_step
from turret.train.linear_start import head_start
from turret.train.slot import LocalSlot
from turret.train.training_plan import DOWNWARD, UPWARD, FoundRate, size_of

ERRORS = 2.0  # standard errors; a smaller difference is noise


@dataclass(frozen=True)
class Score:
    """The result of a trial: the loss of each example, summed over its target tokens, and the number of those."""

    losses: tuple[float, ...]
    weights: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The mean loss per example, or per target token."""
        return sum(self.losses) / sum(self.weights)

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.losses))


def is_better(one: Score | None, other: Score | None) -> bool:
    """Whether the loss of `one` is lower by more than noise. A trial that diverged (None) is worse than any other.

    delta = sum d / sum w,   error^2 = n / (n - 1) sum (d - w delta)^2 / (sum w)^2      for d = other's loss - one's

    Source: the ratio estimator of survey sampling, Cochran (1977), chapter 6.
    """
    if one is None or other is None:
        return one is not None
    differences = [b - a for a, b in zip(one.losses, other.losses, strict=True)]
    total, count = sum(one.weights), len(differences)
    delta = sum(differences) / total
    spread = sum((d - w * delta) ** 2 for d, w in zip(differences, one.weights, strict=True))
    return delta > ERRORS * math.sqrt(spread * count / (count - 1)) / total


def search(default: float, score: Callable[[float], Score | None]) -> tuple[float, dict[float, Score | None]]:
    """Returns the chosen rate and the scores of all rates tried, the default first. score: runs a trial."""
    scores = {default: score(default)}

    def climb(factors: Sequence[float]) -> tuple[list[float], bool]:
        """The rates that were each better than the one before, and whether the next rate was no worse than the last."""
        path = [default]
        for lr in (default * factor for factor in factors):
            scores[lr] = score(lr)
            if scores[lr] is None and scores[path[-1]] is None:
                continue
            if not is_better(scores[lr], scores[path[-1]]):
                return path, not is_better(scores[path[-1]], scores[lr])
            path.append(lr)
        return path, False

    if scores[default] is None:  # the smallest rate that did not diverge: the largest may be too close to divergence
        down, _ = climb(DOWNWARD)
        return min((lr for lr, each in scores.items() if each is not None), default=down[-1]), scores
    up, flat = climb(UPWARD)
    if len(up) > 1:
        return (up[-1] if flat else up[-2]), scores
    return (default if flat else climb(DOWNWARD)[0][-1]), scores


# --- trials -----------------------------------------------------------------------------------------------------------
# Runs the trials of `lr = "auto"`: the same short training at several rates, scored on held-out examples.


WARMUP = 0.25  # of a trial's steps
DIVERGED = 2.0  # times the loss before training: a trial whose latest losses are above that has diverged
LATEST = 4  # losses in their mean


def find_rate(
    recipe: Recipe,
    base: Base,
    task: Task,
    dataset: Dataset,
    *,
    start: StoredAdapter | None = None,
    on_trial: Callable[[float, int], None] | None = None,
) -> FoundRate:
    """Find the learning rate for a recipe on a loaded base, from the training split alone. The base is left as it was.

    The result depends on recipe, data and base alone, so a run that was killed finds the same rate again.

    Args:
        recipe: with its defaults filled in, see `fill_recipe`.
        start: the version that the adapter starts from.
        on_trial: called before each trial with its rate and its number of steps.
    """
    examples = splits_of(recipe, dataset).train
    default = defaults_of(recipe.method, base, task.kind).lr
    size = size_of(len(examples), Schedule.of(recipe, len(examples)).steps)
    if size.reason is not None:
        return FoundRate(default, default, size, {})
    with closing(Trials(recipe, base, task, examples, steps=size.steps, held=size.held, start=start)) as tried:

        def score(lr: float) -> Score | None:
            if on_trial is not None:
                on_trial(lr, size.steps)
            return tried.score(lr)

        lr, scores = search(default, score)
    losses = {rate: None if each is None else each.mean for rate, each in sorted(scores.items())}
    return FoundRate(lr, default, size, losses)


class Trials:
    """Short trainings on one attached adapter, each from the same initial weights. `close` detaches the adapter.

    Args:
        steps: of a trial.
        held: this many of the examples only score.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        task: Task,
        examples: Sequence[Example],
        *,
        steps: int,
        held: int,
        start: StoredAdapter | None = None,
    ) -> None:
        self.recipe, self.task, self.steps = recipe, task, steps
        order = list(range(len(examples)))
        random.Random(recipe.seed).shuffle(order)
        self.items = EncodedRows(task, [examples[place] for place in sorted(order[held:])])
        self.held = EncodedRows(task, [examples[place] for place in order[:held]])
        self.slot = LocalSlot.of_recipe(recipe, base, task, start)
        try:
            base.model.train()
            begins = head_start(recipe, base, task, self.items, self.slot.most_tokens) if start is None else None
            if begins is not None:
                begins.begin(self.slot, defaults_of(recipe.method, base, task.kind).lr, steps)
        except BaseException:
            self.close()
            raise
        self.start = self.slot.optimiser.weights.clone()  # (N,) the initial weights

    def close(self) -> None:
        self.slot.drop()

    def score(self, lr: float) -> Score | None:
        """Train from the initial weights at this rate. Returns the held-out losses; None if it diverged.

        The rate rises and then stays. If it fell to zero, the last steps would hide the noise of a large rate.
        """
        before = self.before
        self.slot.restart(self.start)
        train, warmup = self.recipe.train, max(1, round(WARMUP * self.steps))
        schedule = Schedule(len(self.items), train.batch_size, self.steps, self.recipe.seed, max_steps=self.steps)
        losses: list[float] = []
        for step, indices in schedule.batches():
            batch = self.items.take(indices)
            rate = learning_rate(step, total=self.steps, peak=lr, warmup=warmup, schedule="constant")
            try:
                loss, _ = self.slot.train_step(batch, recipe_step(train, rate))
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
        self.slot.restart(self.start)
        return self._held_out().mean

    def _held_out(self) -> Score:
        return Score(*example_losses(self.slot.model, self.task, self.held, most_tokens=self.slot.most_tokens))
