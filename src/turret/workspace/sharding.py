"""A training with its base in parts on several processes: `train.shard`. What it loads, and what its plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from turret import bases
from turret.bases import Base, ChosenDevice
from turret.bases.device import CPU, gigabytes
from turret.bases.sharded import gather_once, load_in_parts, parts_of
from turret.errors import TrainingError
from turret.plan_check import Check
from turret.recipe import Recipe
from turret.tasks import Task
from turret.train import Plan, distributed
from turret.train.preflight import fits
from turret.workspace.devices import predicted_for
from turret.workspace.ready import PreparedTraining


def begin(recipe: Recipe, here: distributed.Processes) -> None:
    """Connect the processes for a base in parts, if the recipe asks for it. All must call it at the same time.

    Raises:
        TrainingError: there is one process.
    """
    if recipe.train.shard is None:
        return
    if here.size == 1:
        raise TrainingError(
            f'train.shard = "{recipe.train.shard}" divides a base among several processes, and this is one: start it '
            f"with `{distributed.LAUNCH}`, which prints the plan too, or leave train.shard out"
        )
    distributed.mesh()


def load_base(recipe: Recipe, task: type[Task], labels: Sequence[str], device: ChosenDevice) -> Base:
    """A recipe's base: whole, or this process's part of it."""
    request, outputs, dtype, seed = task.request, task.num_labels(labels), recipe.train.dtype, recipe.seed
    if recipe.train.shard is not None:
        mesh = distributed.mesh()
        return load_in_parts(
            recipe.base, task=request, mesh=mesh, device=device, num_labels=outputs, dtype=dtype, seed=seed
        )
    return bases.load(
        recipe.base,
        task=request,
        num_labels=outputs,
        dtype=dtype,
        seed=seed,
        quantization=recipe.base_quantization or "none",
        device=device,
    )


def gather(ready: PreparedTraining) -> None:
    """Make the first pass of a base in parts, in all processes."""
    if parts_of(ready.base.model) > 1:
        gather_once(ready.base.model)


def proof_device(ready: PreparedTraining) -> ChosenDevice:
    """Where the proof loads the base, whole and in one process: the CPU, if the base is in parts."""
    return ChosenDevice(CPU, "the whole base") if parts_of(ready.base.model) > 1 else ready.device


def with_memory(plan: Plan, ready: PreparedTraining) -> Plan:
    """The plan of a training whose base is in parts: its memory is computed from shapes, not measured."""
    parts, base = parts_of(ready.base.model), ready.base
    text = f"{parts} processes, each keeps {gigabytes(base.bytes)} of the base and gathers one layer after another"
    rows = [Check("shard", "ok", text)]
    predicted = predicted_for(ready.recipe, type(ready.task), ready.task.labels, base.model.device, parts=parts)
    if predicted is not None:
        rows.append(fits(predicted, base))
    rows.append(Check("time", "ok", "not measured for a base in parts: watch the first steps"))
    trainable = None if predicted is None else predicted.trainable // 4
    return replace(plan, checks=(*plan.checks, *rows), memory=predicted, trainable=trainable)
