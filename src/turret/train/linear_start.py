"""Starts a new head at the linear solution: a regularised regression on what the base gives the head.

A new head that starts at random sends random gradients into the adapter. Where the base's outputs are small, it also
needs thousands of steps to grow large enough. Source: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features
and Underperform Out-of-Distribution" (linear probing, then fine-tuning).

A head reads the first token of an encoder. A checkpoint that was trained for embeddings is made to be read by the mean
of all tokens, and its first token says less. So before the solution is computed, the adapter learns, without labels,
to give the head what the mean would give it, if cross-validation finds that the mean predicts the labels better.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from turret import adapters
from turret.adapters import drawing, packed
from turret.bases import Base
from turret.engine.protocol import Loss
from turret.engine.scheduler import between_passes
from turret.errors import LossNotFinite
from turret.families import parts_of_head
from turret.ops.dropout import Draws
from turret.recipe import Recipe
from turret.tasks import Task
from turret.train.adamw import learning_rate
from turret.train.batches import EncodedRow, EncodedRows, Schedule, by_length, spread_indices
from turret.train.evaluation import evaluation_mode
from turret.train.initialize import recipe_step
from turret.train.slot import LocalSlot

MOST_EXAMPLES = 10_000  # whose features are computed
MOST_TRIED = 2_000  # examples of the cross-validation
FOLDS = 3  # of the cross-validation
DRAWN_ROWS = 600  # at least this many rows give the solution: with fewer examples each is read several times
ROWS_PER_OUTPUT = 25  # and at least this many for each output, but no more than MOST_EXAMPLES in all
PENALTIES = (100.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # in the order in which they are tried
ITERATIONS = 50  # of L-BFGS
BETTER = 0.02  # the share by which the mean's loss must be lower
STEPS = 600  # most in which the adapter learns the mean
WARMUP = 0.1  # of those steps
TIMED = 32  # examples whose features are timed
ITERATIONS_TIMED = 10
SAY_SECONDS = 10.0  # between lines of progress
SLOT = f"slots.{adapters.ATTACHED}."  # in the names of a head's trained copy
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadStart:
    """Sets the head of an attached adapter before the first step of a training.

    Args:
        items: the training examples.
        most_tokens: of one pass.
        layer: computes the outputs.
    """

    recipe: Recipe
    base: Base
    task: Task
    items: EncodedRows
    most_tokens: int
    layer: nn.Linear

    def begin(
        self, slot: LocalSlot, lr: float, steps: int, say: Callable[[str], None] = lambda _: None
    ) -> dict[str, float]:
        """Set the last layer to the linear solution. Returns the penalty, and the steps that learnt the mean if any.

        Args:
            slot: trains the adapter.
            lr: the largest rate of those steps.
            steps: of the training; at most twice as many learn the mean.
            say: called with a line of progress.
        """
        say("computing the linear solution that the head starts with")
        some = self.items.take(spread_indices(len(self.items), MOST_EXAMPLES))
        targets = self.task.targets([item.example for item in some])
        _, loss = self.choose_penalty(self.features(some), targets)
        said: dict[str, float] = {}
        if self._may_learn:
            mean = self.features(some, mean=True)
            _, loss_of_mean = self.choose_penalty(mean, targets)
            if loss_of_mean < (1 - BETTER) * loss:
                taught = min(2 * steps, STEPS)
                self._learn(slot, mean, some, lr, taught, say)
                learnt = relative_distance(self.features(some), mean, mean.var())
                said |= {"mean_steps": taught, "mean_loss": float(learnt)}
        self.base.model.train()
        # With dropout, as in the steps to come: else it outweighs features that hardly vary. Of few examples, or few of
        # each class, one draw is mostly noise, which a solution would fit.
        draws = draws_of(len(some), len(self.layer.weight))
        read = torch.cat([self.features(some, dropout=Draws(slot.seed, draw)) for draw in range(draws)])
        targets = targets.repeat(draws, *(1 for _ in targets.shape[1:]))
        if not bool(torch.isfinite(read).all()):
            raise LossNotFinite("what the head reads became infinite")
        penalty, _ = self.choose_penalty(read, targets, draws)
        self.set(*solve(read, targets, self.task.loss, penalty, len(self.layer.weight)))
        slot.restart(slot.optimiser.weights.clone())
        return {"penalty": penalty, **said}

    def most_seconds(self, step: float, steps: int, clock: Callable[[], float]) -> float:
        """The time of `begin` if the adapter learns the mean and every penalty is tried.

        Args:
            step: seconds of an optimiser step.
            steps: of the training.
            clock: seconds.
        """
        count, examples = len(self.items), self.items.examples
        sample = self.items.take(spread_indices(count, TIMED))
        started = clock()
        read = self.features(sample)
        reading = (clock() - started) / len(sample) * min(count, MOST_EXAMPLES)
        targets = self.task.targets([examples[place] for place in spread_indices(count, MOST_TRIED)])
        draws = draws_of(min(count, MOST_EXAMPLES), len(self.layer.weight))
        solving = self._seconds_of_penalties(targets.repeat(draws, *(1 for _ in targets.shape[1:])), read, clock)
        if not self._may_learn:
            return (1 + draws) * reading + 2 * solving
        return (3 + draws) * reading + 3 * solving + min(2 * steps, STEPS) * step

    def _seconds_of_penalties(self, targets: Tensor, read: Tensor, clock: Callable[[], float]) -> float:
        """The time of a cross-validation in which every penalty is tried and takes all its iterations."""
        features = torch.randn(len(targets), read.shape[1], generator=torch.Generator().manual_seed(0))
        begin, seconds = features.new_zeros(len(self.layer.weight), features.shape[1] + 1), list[float]()
        for iterations in (1, 1, 1 + ITERATIONS_TIMED):  # the very first one also loads and warms what it calls
            started = clock()
            _minimise(features, targets, self.task.loss, PENALTIES[-1], begin, iterations)
            seconds.append(clock() - started)
        return max(0.0, seconds[2] - seconds[1]) / ITERATIONS_TIMED * ITERATIONS * FOLDS * len(PENALTIES)

    @property
    def _may_learn(self) -> bool:
        """Whether the adapter can learn to give the head the mean instead of the first token."""
        return self.base.family.pooling(self.base.model.config) == "first" and not self.recipe.method.head_alone

    def choose_penalty(self, features: Tensor, targets: Tensor, draws: int = 1) -> tuple[float, float]:
        """The penalty that cross-validation chooses, and its mean loss on held-out examples; `draws` as there."""
        count = len(features) // draws
        some = torch.tensor(spread_indices(count, MOST_TRIED))
        rows = torch.cat([some + draw * count for draw in range(draws)])
        return cross_validated(features[rows], targets[rows], self.task.loss, len(self.layer.weight), draws)

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Give the last layer a solution."""
        self.layer.weight.copy_(weight)
        if self.layer.bias is not None:
            self.layer.bias.copy_(bias)

    def features(self, items: Sequence[EncodedRow], *, mean: bool = False, dropout: Draws | None = None) -> Tensor:
        """What the last layer reads for some items: (N, D) float32 on the CPU.

        Args:
            mean: if the head were given the mean of the bare base's tokens.
            dropout: as in this step of a training; None for none.
        """
        read: list[Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda _, args: read.append(args[0].float().cpu()))
        places = list[int]()
        model, family = self.base.model, self.base.family
        bare = None if self.recipe.method.every_weight else adapters.BARE
        try:
            for piece in by_length([item.tokens for item in items], self.most_tokens):
                rows = [items[place].source for place in piece]
                pooled = None
                if mean:
                    with evaluation_mode(model, bare):
                        pooled = packed.pooled_states(model, rows, "mean")
                own = drawing(model, dropout, piece) if dropout else evaluation_mode(model, None)
                with torch.no_grad(), own:
                    packed.classify_logits(model, rows) if pooled is None else family.classify(
                        parts_of_head(model), pooled
                    )
                places += piece
                between_passes()
        finally:
            handle.remove()
        return torch.cat([each.flatten(1) for each in read])[torch.tensor(places).argsort()]

    def _learn(
        self,
        slot: LocalSlot,
        wanted: Tensor,
        items: Sequence[EncodedRow],
        lr: float,
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        """Train the adapter to give the last layer `wanted` (N, D) for some items."""
        said = time.monotonic()
        train = self.recipe.train
        teaching = Loss("mean of all tokens", functools.partial(relative_distance, variance=wanted.var()))
        schedule = Schedule(len(items), train.batch_size, steps, self.recipe.seed, max_steps=steps)
        handle = self.layer.register_forward_hook(lambda _, args, __: args[0].flatten(1))
        slot.model.train()
        try:
            for step, indices in schedule.batches():
                rate = learning_rate(
                    step, total=steps, peak=lr, warmup=max(1, round(WARMUP * steps)), schedule="linear"
                )
                batch = [replace(items[row], wanted=wanted[row]) for row in indices]
                slot.train_step(batch, recipe_step(train, rate), teaching)
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    say(f"teaching the adapter the mean that the head starts with: {step} of {steps} steps")
        finally:
            handle.remove()


def relative_distance(read: Tensor, wanted: Tensor, variance: Tensor) -> Tensor:
    """The mean squared distance between what the last layer reads and what is wanted, divided by a variance."""
    return (read.float() - wanted).square().mean() / variance


def head_start(recipe: Recipe, base: Base, task: Task, items: EncodedRows, most_tokens: int) -> HeadStart | None:
    """The start of the attached adapter's head. None without a head, or if the checkpoint has one for these outputs."""
    if not task.solved:
        return None
    heads = tuple(f"{each}." for each in base.family.head_modules)
    fresh = {name for name in base.fresh if name.startswith(heads)}
    trained = adapters.trainable_parameters(base.model)
    found = [each for name, each in trained.items() if each.ndim == 2 and name.replace(SLOT, "") in fresh]
    layers = [
        each for each in base.model.modules() if isinstance(each, nn.Linear) and found and each.weight is found[-1]
    ]
    return HeadStart(recipe, base, task, items, most_tokens, layers[0]) if layers else None


def draws_of(examples: int, outputs: int) -> int:
    """How often each example is read, with another draw of dropout each time, so that there are enough rows.

    examples: at most MOST_EXAMPLES.
    """
    wanted = max(DRAWN_ROWS, ROWS_PER_OUTPUT * outputs)
    return min(-(-wanted // examples), MOST_EXAMPLES // examples)


def cross_validated(
    features: Tensor, targets: Tensor, loss: LossFunction, outputs: int, draws: int = 1
) -> tuple[float, float]:
    """The penalty with the lowest mean loss on held-out rows, and that loss.

    A held-out row whose class is not among the other folds' rows is not counted: no penalty can predict it, and a large
    one, which predicts nothing, has the lowest loss on it. The folds share out the rows of each class.

    Args:
        features: (N, D).
        targets: (N, ...), as `loss` takes them.
        loss: the mean over rows of logits (N, C) and targets.
        outputs: C.
        draws: the rows are the same examples that many times, one after the other. All of an example are in one fold.
    """
    count = len(features) // draws
    folds = _folds(targets[:count]).repeat(draws)
    kept = [folds != fold for fold in range(min(FOLDS, count))] if count > 1 else [folds == 0]
    held_out = [_known_rows(targets, rows, folds == fold) for fold, rows in enumerate(kept)]
    counted = max(1, sum(int(out.sum()) for out in held_out))
    moments = [_moments(features[rows]) for rows in kept]
    found = [features.new_zeros(outputs, features.shape[1] + 1) for _ in kept]
    best, lowest = PENALTIES[0], math.inf
    for penalty in PENALTIES:  # a smaller one begins at the solution of the larger one
        held = 0.0
        for fold, (rows, out, (middle, scale)) in enumerate(zip(kept, held_out, moments, strict=True)):
            z = (features - middle) / scale
            found[fold] = _minimise(z[rows], targets[rows], loss, penalty, found[fold])
            if bool(out.any()):
                held += float(loss(_logits(z[out], found[fold]), targets[out])) * int(out.sum()) / counted
        if held > lowest:
            break
        best, lowest = penalty, held
    return best, lowest


def _folds(targets: Tensor) -> Tensor:
    """The fold of each row: (N,). Of rows with class numbers, each class is shared out among the folds."""
    count = len(targets)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    if targets.ndim == 1 and not targets.is_floating_point():
        order = order[targets[order].argsort(stable=True)]
    folds = torch.empty(count, dtype=torch.long)
    folds[order] = torch.arange(count) % min(FOLDS, count)
    return folds


def _known_rows(targets: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """Which of the rows `out` have a class that is among `rows`, or all their classes: masks (N,)."""
    if targets.is_floating_point():
        return out
    columns = targets.reshape(len(targets), -1).unbind(1)
    return out & torch.stack([torch.isin(each, each[rows]) for each in columns]).all(0)


def solve(features: Tensor, targets: Tensor, loss: LossFunction, penalty: float, outputs: int) -> tuple[Tensor, Tensor]:
    """The linear map with the lowest penalised loss.

    min over W, b of  loss(z W^T + b, y) + penalty / 2 |W|^2,   z: each feature with mean 0 and variance 1
    """
    middle, scale = _moments(features)
    row = _minimise(
        (features - middle) / scale, targets, loss, penalty, features.new_zeros(outputs, features.shape[1] + 1)
    )
    weight = row[:, :-1] / scale
    return weight, row[:, -1] - weight @ middle


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, (D,) each; of a feature that does not vary, 1."""
    scale = features.std(0, correction=0)
    return features.mean(0), torch.where(scale > 1e-12, scale, torch.ones_like(scale))


def _minimise(
    z: Tensor, targets: Tensor, loss: LossFunction, penalty: float, begin: Tensor, iterations: int = ITERATIONS
) -> Tensor:
    """Weights and biases (C, D + 1) with the lowest penalised loss, from `begin` on, by L-BFGS."""
    row = begin.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([row], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(_logits(z, row), targets) + penalty / 2 * row[:, :-1].square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return row.detach()


def _logits(z: Tensor, row: Tensor) -> Tensor:
    """(N, C)."""
    return z @ row[:, :-1].T + row[:, -1]
