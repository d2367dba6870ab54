"""The preflight: everything that can be known of a training before its first step, with a remedy for what is wrong.

Asks `checks` and `cost`, and leaves the base as it was. Refuses to know how a plan is shown.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from turret.errors import PreflightRefused
from turret.methods.lookup import numbers_of
from turret.plan_check import Check
from turret.train import checks, memory
from turret.train.batches import Items, Schedule
from turret.train.cost import Cost, measure
from turret.train.defaults import filled
from turret.train.initialize import InitialAdapter
from turret.train.rates import AUTO, MOST_TRIALS, Found, Size, size_of
from turret.train.splits import Splits, splits_of
from turret.train.step import memory_ran_out

LOOKED_AT = 1000  # training examples whose lengths are looked at
EVALUATION = 0.35  # of the time of training on as many tokens: no backward pass


@dataclass(frozen=True)
class Plan:
    """What a training will do and cost, and what is wrong with it."""

    checks: tuple[Check, ...]
    memory: memory.Prediction | None  # None where it was not measured
    seconds: float | None  # of training, every evaluation, and the proof
    steps: int
    lr: float  # this method's own where it is still to be found
    trainable: int | None
    total: int
    found: Found | None = None  # how `lr` was found, where the recipe says "auto"

    @property
    def refused(self) -> bool:
        return any(check.level == "refuse" for check in self.checks)

    def refusal(self) -> str:
        """One line for all that was refused."""
        return "; ".join(str(check) for check in self.checks if check.level == "refuse")

    def require(self) -> None:
        """Raise PreflightRefused where a check refuses."""
        if self.refused:
            raise PreflightRefused(self.refusal())

    def with_rate(self, found: Found) -> Plan:
        """The plan once trials have found what `lr = "auto"` is."""
        told = Check("learning rate", "ok", str(found))
        checked = tuple(told if check.name == told.name else check for check in self.checks)
        return replace(self, lr=found.lr, found=found, checks=checked)

    def to_json(self) -> dict[str, Any]:
        return {
            "refused": self.refused,
            "checks": [check.to_json() for check in self.checks],
            "memory": None if self.memory is None else self.memory.to_json(),
            "seconds": self.seconds,
            "steps": self.steps,
            "lr": self.lr,
            "rates": None if self.found is None else self.found.to_json(),
            "parameters": {"trainable": self.trainable, "total": self.total},
        }


def plan(
    recipe: Any,
    base: Any,
    task: Any,
    dataset: Any,
    *,
    measured: bool = True,
    start: InitialAdapter | None = None,
    proof_seconds: float = 0.0,
) -> Plan:
    """Check a recipe against its base and data.

    Args:
        measured: run a few passes on the model for memory and time.
        start: the version that the adapter goes on from.
        proof_seconds: what the proof will take, which loads the base in a fresh process.
    """
    before = memory.resident()
    made = splits_of(recipe, dataset)
    recipe = filled(recipe, base, task.kind, len(made.train))
    train = recipe.train
    schedule = Schedule(len(made.train), train.batch_size, train.epochs, recipe.seed, train.max_steps)
    items = Items(task, made.train)
    seen = items.take(_spread(len(items), LOOKED_AT))
    total = sum(each.numel() for each in base.model.parameters())
    own = recipe.method.defaults(base.family.kind, classify=not task.generates, parameters=total)
    auto = size_of(len(made.train), schedule.steps) if train.lr == AUTO else None
    found = [
        numbers_of(recipe.method).targets(base.model),
        recipe.method.rate_check(train.lr, own.lr) if auto is None else checks.rates(auto, own.lr),
        *recipe.method.checks(base.family.kind),
        checks.steps(recipe, schedule, own.steps),
        *checks.splits(made, dataset),
        *checks.labels(task, made.train),
        checks.special_tokens(base, task),
        *checks.inputs(seen, task, base),
        *checks.outputs(seen, task),
        *checks.positions(recipe, task, base),
        *checks.precision(recipe, base),
    ]
    cost = None
    if measured and not any(check.level == "refuse" for check in found):
        cost = _cost(recipe, base, task, items, schedule, total, found, start, before)
    seconds = None
    if cost is not None:
        seconds = _seconds(recipe, made, dataset, task, schedule, cost) + proof_seconds
        found.insert(1, checks.share(cost.trainable, total))
        found += [
            fits(cost.memory, base),
            Check("time", "ok", f"about {duration(seconds)} for {schedule.steps} steps{_trials(auto, cost)}"),
            *checks.processors(cost.others, torch.get_num_threads(), os.cpu_count() or 1),
        ]
    return Plan(
        checks=tuple(found),
        memory=None if cost is None else cost.memory,
        seconds=seconds,
        steps=schedule.steps,
        lr=own.lr if auto is not None else train.lr,
        trainable=None if cost is None else cost.trainable,
        total=total,
    )


def _cost(
    recipe: Any,
    base: Any,
    task: Any,
    items: Items,
    schedule: Schedule,
    total: int,
    found: list[Check],
    start: InitialAdapter | None,
    before: int,
) -> Cost | None:
    """Measured, unless the machine cannot hold even that: then a refusal is added to `found`."""
    room = memory.available(base.model.device)
    if recipe.method.every_weight and 16 * total > room:
        needed = f"every weight, its gradient and two moments take {memory.mega(16 * total)}"
        remedy = "use method lora or prefix, or a smaller base"
        found.append(Check("memory", "refuse", f"{needed}, {memory.mega(room)} are free", remedy))
        return None
    try:
        return measure(recipe, base, task, items, schedule, before=before, start=start)
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        text = f"a trial step ran out of memory with {memory.mega(room)} free"
        found.append(Check("memory", "refuse", text, "lower train.micro_batch_tokens or task.max_tokens"))
        return None


def fits(predicted: memory.Prediction, base: Any) -> Check:
    """Whether the machine holds what the training takes beside the base that is loaded already."""
    room = memory.available(base.model.device)
    text = f"{predicted}, {memory.mega(room)} free"
    remedy = "lower train.micro_batch_tokens or task.max_tokens, or free memory"
    if predicted.above_base > room:
        return Check("memory", "refuse", text, remedy)
    if predicted.above_base > 0.8 * room:
        return Check("memory", "warn", text, remedy)
    return Check("memory", "ok", text)


def _seconds(recipe: Any, made: Splits, dataset: Any, task: Any, schedule: Schedule, cost: Cost) -> float:
    """Of all steps, the evaluations within the run, and the last one, which also writes texts."""
    each_token = EVALUATION * cost.seconds / cost.step_tokens
    every = recipe.train.evaluate
    within = 0.0
    if made.watched is not None and every != "never":
        times = -(-schedule.steps // (schedule.steps_per_epoch if every == "epoch" else every))
        within = times * _tokens(task, made.watched) * each_token
    held = [split for split in (dataset.validation, dataset.test) if split]
    last = sum(_tokens(task, split) for split in held) * each_token
    if cost.writing is not None:
        last += sum(cost.writing.seconds(len(split), int(task.generation["max_new_tokens"])) for split in held)
    return schedule.steps * cost.seconds + within + last


def _tokens(task: Any, examples: Sequence[Any]) -> float:
    """How many tokens these examples have, from some of them."""
    items = Items(task, examples)
    some = items.take(_spread(len(items), LOOKED_AT // 10))
    return sum(item.tokens for item in some) / len(some) * len(items)


def _trials(auto: Size | None, cost: Cost) -> str:
    """What finding the learning rate adds to the time."""
    if auto is None or auto.reason is not None:
        return ""
    return f", before them at most {duration(MOST_TRIALS * auto.steps * cost.seconds)} to find the learning rate"


def _spread(count: int, most: int) -> Sequence[int]:
    """At most so many indices, evenly over all."""
    return range(count) if count <= most else [place * count // most for place in range(most)]


def duration(seconds: float) -> str:
    """For reading: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
