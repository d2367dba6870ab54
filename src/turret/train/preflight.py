"""The preflight: checks a training before its first step and predicts its time and memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from turret import quantized
from turret.bases import Base, ChosenDevice
from turret.bases.device import gigabytes
from turret.data import Dataset, Example
from turret.errors import PreflightRefused
from turret.json_types import JsonObject
from turret.methods.lookup import numbers_of
from turret.notebook import Cell, Table, as_html, marked, size, span
from turret.plan_check import Check
from turret.recipe import Recipe
from turret.tasks import Task, writes
from turret.train import checks, memory
from turret.train.batches import Items, Schedule, spread
from turret.train.cost import Cost, measure
from turret.train.defaults import defaults_of, filled
from turret.train.initialize import InitialAdapter
from turret.train.rates import MOST_TRIALS, FoundRate, TrialSize, size_of
from turret.train.splits import Splits, splits_of
from turret.train.step import memory_ran_out

SAMPLED = 1000  # training examples whose lengths are checked
EVALUATION = 0.35  # of the time of training on as many tokens, because there is no backward pass


@dataclass(frozen=True)
class Plan:
    """What a training will do and cost, and what is wrong with it."""

    checks: tuple[Check, ...]
    memory: memory.Prediction | None  # None: not measured
    seconds: float | None  # of training, every evaluation, and the proof
    steps: int
    lr: float  # the method's own if the recipe says "auto" and no trial has run
    trainable: int | None
    total: int
    found: FoundRate | None = None  # how `lr` was found, if the recipe says "auto"

    @property
    def refused(self) -> bool:
        """Whether a check refuses the training."""
        return any(check.level == "refuse" for check in self.checks)

    def refusal(self) -> str:
        """All refusals in one line."""
        return "; ".join(str(check) for check in self.checks if check.level == "refuse")

    def _repr_html_(self) -> str:
        return as_html("Plan", self.facts(), self.table())

    def facts(self) -> dict[str, Cell]:
        """What the training will cost, in words."""
        trained = None if self.trainable is None else f"{self.trainable:,} of {self.total:,} parameters"
        return {
            "steps": f"{self.steps:,}",
            "time": None if self.seconds is None else f"about {span(self.seconds)}",
            "memory": None if self.memory is None else size(self.memory.total),
            "learning rate": f"{self.lr:g}",
            "trains": trained,
        }

    def table(self) -> Table:
        """The checks, a row each."""
        rows = [(marked(each.level, each.name), each.text, each.remedy) for each in self.checks]
        return Table(("check", "found", "to do"), rows)

    def require(self) -> None:
        """Raise PreflightRefused if a check refuses."""
        if self.refused:
            raise PreflightRefused(self.refusal())

    def with_rate(self, found: FoundRate) -> Plan:
        """The plan with the rate that trials found for `lr = "auto"`."""
        row = Check("learning rate", "ok", str(found))
        rows = tuple(row if check.name == row.name else check for check in self.checks)
        return replace(self, lr=found.lr, found=found, checks=rows)

    def to_json(self) -> JsonObject:
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
    recipe: Recipe,
    base: Base,
    task: Task,
    dataset: Dataset,
    *,
    measured: bool = True,
    start: InitialAdapter | None = None,
    proof_seconds: float = 0.0,
    device: ChosenDevice | None = None,
) -> Plan:
    """Check a recipe against its base and data. The base is left as it was.

    Args:
        measured: run a few passes on the model for memory and time.
        start: the version that the adapter starts from.
        proof_seconds: time of the proof, which loads the base in a fresh process.
        device: where the base is, and why; for a row of the plan.
    """
    before = memory.resident(base.model.device)
    used = splits_of(recipe, dataset)
    recipe = filled(recipe, base, task.kind, len(used.train))
    schedule = Schedule.of(recipe, len(used.train))
    items = Items(task, used.train)
    sample = items.take(spread(len(items), SAMPLED))
    total = quantized.count(base.model)
    own = defaults_of(recipe.method, base, task.kind)
    lr = recipe.train.lr
    auto = None
    if lr is None or isinstance(lr, str):  # "auto"
        auto = size_of(len(used.train), schedule.steps)
        lr, rate = own.lr, checks.rates(auto, own.lr)
    else:
        rate = recipe.method.rate_check(lr, own.lr)
    rows = [
        numbers_of(recipe.method).targets(base.model),
        rate,
        *recipe.method.checks(base.family.kind),
        checks.steps(recipe, schedule, own.steps),
        *checks.splits(used, dataset),
        *checks.labels(task, used.train),
        checks.special_tokens(base, task),
        *checks.inputs(sample, task, base),
        *checks.language(sample),
        *checks.outputs(sample, task),
        *checks.positions(recipe, task, base),
        *checks.precision(recipe, base),
        *([] if device is None else [Check("device", "ok", str(device))]),
        *checks.checkpoints(base),
    ]
    cost = None
    if measured and not any(check.level == "refuse" for check in rows):
        cost = _cost(recipe, base, task, items, schedule, total, rows, start, before)
    seconds = None
    if cost is not None:
        seconds = _seconds(recipe, used, dataset, task, schedule, cost) + proof_seconds
        rows.insert(1, checks.share(cost.trainable, total))
        rows += [
            fits(cost.memory, base),
            Check("time", "ok", f"about {duration(seconds)} for {schedule.steps} steps{_before(auto, cost)}"),
            *checks.processors(cost.others, torch.get_num_threads(), os.cpu_count() or 1),
        ]
    return Plan(
        checks=tuple(rows),
        memory=None if cost is None else cost.memory,
        seconds=seconds,
        steps=schedule.steps,
        lr=lr,
        trainable=None if cost is None else cost.trainable,
        total=total,
    )


def _cost(
    recipe: Recipe,
    base: Base,
    task: Task,
    items: Items,
    schedule: Schedule,
    total: int,
    rows: list[Check],
    start: InitialAdapter | None,
    before: int,
) -> Cost | None:
    """The measured cost; None, and a refusal in `rows`, if there is too little memory to measure it."""
    room = memory.available(base.model.device)
    if recipe.method.every_weight and 16 * total > room:
        needed = f"every weight, its gradient and two moments take {gigabytes(16 * total)}"
        remedy = "use method lora or prefix, or a smaller base"
        rows.append(Check("memory", "refuse", f"{needed}, {gigabytes(room)} are free", remedy))
        return None
    try:
        return measure(recipe, base, task, items, schedule, before=before, start=start)
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        text = f"a trial step ran out of memory with {gigabytes(room)} free"
        rows.append(Check("memory", "refuse", text, "lower train.micro_batch_tokens or task.max_tokens"))
        return None


def fits(predicted: memory.Prediction, base: Base) -> Check:
    """Whether the machine has room for a training besides the base, which is loaded already."""
    room = memory.available(base.model.device)
    text = f"{predicted}, {gigabytes(room)} free"
    remedy = "lower train.micro_batch_tokens or task.max_tokens, or free memory"
    remedy += "" if base.model.device.type == "cpu" else ', or set train.device to "cpu"'
    if predicted.above_base > room:
        return Check("memory", "refuse", text, remedy)
    if predicted.above_base > 0.8 * room:
        return Check("memory", "warn", text, remedy)
    return Check("memory", "ok", text)


def _seconds(recipe: Recipe, used: Splits, dataset: Dataset, task: Task, schedule: Schedule, cost: Cost) -> float:
    """The time of the head's start and all steps, of evaluations, and of the final one, which also generates texts."""
    each_token = EVALUATION * cost.seconds / cost.step_tokens
    every = recipe.train.evaluate
    during = 0.0
    if used.watched is not None and every != "never":
        times = -(-schedule.steps // (every if isinstance(every, int) else schedule.steps_per_epoch))
        during = times * _tokens(task, used.watched) * each_token
    splits = [split for split in (dataset.validation, dataset.test) if split]
    final = sum(_tokens(task, split) for split in splits) * each_token
    if cost.generation is not None and writes(task):
        new_tokens = int(task.generation["max_new_tokens"])
        final += sum(cost.generation.seconds(len(split), new_tokens) for split in splits)
    return cost.head_start + schedule.steps * cost.seconds + during + final


def _tokens(task: Task, examples: Sequence[Example]) -> float:
    """The number of tokens of all examples, estimated from some of them."""
    items = Items(task, examples)
    sample = items.take(spread(len(items), SAMPLED // 10))
    return sum(item.tokens for item in sample) / len(sample) * len(items)


def _before(auto: TrialSize | None, cost: Cost) -> str:
    """What is done before the first step, and its time, for the end of the row on time."""
    text = ""
    if cost.head_start >= 1:
        text = f", of it at most {duration(cost.head_start)} before the first step, for the start of the head"
    if auto is not None and auto.reason is None:
        text += f", before them at most {duration(MOST_TRIALS * auto.steps * cost.seconds)} to find the learning rate"
    return text


def duration(seconds: float) -> str:
    """Seconds as text: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
