"""What a training has in memory before its first step: its device, and its base, whole or in parts (`train.shard`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from turret import bases
from turret.adapters import StoredAdapter
from turret.bases import Base, ChosenDevice, choose_device
from turret.bases.base import dtype_on
from turret.bases.device import CPU, Gpu, Machine, gigabytes, this_machine
from turret.bases.meta_model import room_to_answer, skeleton
from turret.bases.sharded import gather_once, load_in_parts, parts_of
from turret.data import Dataset
from turret.errors import AdapterError, PreflightRefused, TrainingError, UnknownFamily
from turret.ops.table import why_no_gpu_feature
from turret.recipe import Data, Recipe
from turret.tasks import Task
from turret.train import distributed
from turret.train.gpu_memory import Work, in_parts, predict_on_gpu, refusal
from turret.train.memory import Prediction

AUTO = "auto"
GPU_PASSES = (16384, 8192, 4096)  # tokens of a training pass on a GPU, the most that fit
GPU_SHARE = 0.6  # of what weights and states leave free: lengths differ, and an allocator keeps holes
UNPREDICTED = 1.5  # times the room to answer: a training whose memory cannot be predicted from shapes


@dataclass(frozen=True)
class PreparedTraining:
    """Everything that a training needs, in memory."""

    recipe: Recipe  # with every default filled in
    dataset: Dataset
    base: Base
    bare: Base  # with nothing attached while `base` trains, to be asked; `base` itself if it lies in parts
    task: Task
    notes: list[str]
    load_seconds: float
    resident: int  # bytes of the process after the base was loaded
    start: StoredAdapter | None  # the version that `train.init_from` names
    device: ChosenDevice  # where the base is, and why

    @property
    def parts(self) -> tuple[Recipe, Base, Task, Dataset]:
        """The positional arguments of `turret.train`'s functions."""
        return self.recipe, self.base, self.task, self.dataset


# --- device -----------------------------------------------------------------------------------------------------------
# A GPU takes a training if the predicted memory of the whole training fits there.


def choose_for(recipe: Recipe, task: type[Task], labels: Sequence[str], machine: Machine | None = None) -> ChosenDevice:
    """The device of a training, before its base is read.

    Args:
        recipe: `train.device` names the device; None: auto.
        task: of the data.
        labels: of a classifier.
        machine: the devices to choose from; None: those of this machine.

    Raises:
        DeviceError: the device is not there.
        PreflightRefused: the weights and the trained states do not fit on the GPU that the recipe names.
    """
    name = recipe.train.device or AUTO
    if name in ("cpu", "mps"):
        return choose_device(name, machine=machine)
    machine = this_machine() if machine is None else machine
    gpus = {gpu.device: gpu for gpu in machine.gpus}
    chosen = choose_device(name, lambda at: _needed(recipe, task, labels, gpus[at]), machine)
    gpu = gpus.get(chosen.device)
    if gpu is not None and name != AUTO:
        predicted = predicted_for(recipe, task, labels, gpu.device)
        problem = None if predicted is None else refusal(predicted, gpu.free, recipe.base, str(gpu.device))
        if problem is not None:
            raise PreflightRefused(problem)
    return chosen


def checkpoints_for(
    recipe: Recipe, task: type[Task], labels: Sequence[str], device: torch.device, machine: Machine | None = None
) -> str | None:
    """Why the layers of a training on a GPU are checkpointed, though the recipe leaves it open; None if they are not.

    Args:
        recipe: `train.checkpoint_layers`, if it is set, decides.
        device: the one that `choose_for` chose.
        machine: its devices; None: those of this machine.
    """
    if device.type != "cuda" or recipe.train.checkpoint_layers is not None or recipe.train.shard is not None:
        return None
    machine = this_machine() if machine is None else machine
    free = next(gpu.free for gpu in machine.gpus if gpu.device == device)
    whole = predicted_for(recipe, task, labels, device)
    if whole is None or whole.total <= free:
        return None
    return f"about {gigabytes(whole.total)} would be needed without it, and {gigabytes(free)} are free"


def pass_tokens_for(
    recipe: Recipe,
    task: type[Task],
    labels: Sequence[str],
    device: torch.device,
    machine: Machine | None = None,
    *,
    checkpointed: bool = False,
) -> int | None:
    """Tokens of a training pass on a GPU: the most that take a share of its free memory, as the plan predicts them.

    A pass of the few hundred tokens that suit a CPU would leave a GPU waiting for launches.

    Args:
        device: the one that `choose_for` chose.
        machine: its devices; None: those of this machine.
        checkpointed: whether its layers are.

    Returns:
        None if the recipe decides, on a CPU, for a base in parts, and if not even the fewest tokens fit.
    """
    if device.type != "cuda" or recipe.train.micro_batch_tokens is not None or recipe.train.shard is not None:
        return None
    machine = this_machine() if machine is None else machine
    free = next(gpu.free for gpu in machine.gpus if gpu.device == device)
    for most in GPU_PASSES:
        asked = recipe.with_overrides({"train.micro_batch_tokens": str(most)})
        predicted = predicted_for(asked, task, labels, device, checkpointed=checkpointed)
        if predicted is None:
            return None
        if predicted.activations <= GPU_SHARE * (free - (predicted.total - predicted.activations)):
            return most
    return None


def predicted_for(
    recipe: Recipe,
    task: type[Task],
    labels: Sequence[str],
    device: torch.device,
    *,
    parts: int = 1,
    checkpointed: bool | None = None,
    work: Work | None = None,
) -> Prediction | None:
    """The predicted memory of a recipe's training on a GPU; None if it cannot be told from shapes alone.

    Args:
        parts: in how many parts the layers of the base lie, with `train.shard`.
        checkpointed: whether its layers are checkpointed; None: as the recipe says.
        work: its largest pass; None: of texts that are all as long as the recipe allows.

    Raises:
        BaseModelError: the base cannot be found.
    """
    source = bases.resolve(recipe.base)
    if checkpointed is None:
        checkpointed = bool(recipe.train.checkpoint_layers)
    shape = recipe.model_copy(update={"name": "shape", "seed": 0, "data": Data(source="-")})  # the rest decides
    try:
        outputs = task.num_labels(labels)
        return _predicted(source.folder, shape.to_toml(), task, outputs, device, parts, checkpointed, work)
    except (UnknownFamily, AdapterError, NotImplementedError, RuntimeError, TypeError):
        return None  # such as a module that needs numbers; the plan measures it on the GPU


@lru_cache(maxsize=64)
def _predicted(
    _folder: Path,
    shape: str,
    task: type[Task],
    outputs: int | None,
    device: torch.device,
    parts: int,
    checkpointed: bool,
    work: Work | None,
) -> Prediction:
    """The predicted memory of a training on the base in a folder. shape: its recipe (TOML), without name and data."""
    recipe = Recipe.from_toml(shape)
    model = skeleton(bases.resolve(recipe.base), task.head, outputs)
    dtype = dtype_on(device, recipe.train.dtype)
    predicted = predict_on_gpu(
        model,
        recipe.method,
        work or Work.of(recipe, model),
        dtype,
        nf4=recipe.base_quantization == "nf4",
        optimizer=recipe.train.optimizer,
        checkpointed=checkpointed,
        attention=why_no_gpu_feature("attention", device, dtype) is None,
    )
    return predicted if parts == 1 else in_parts(predicted, model, parts)


def _needed(recipe: Recipe, task: type[Task], labels: Sequence[str], gpu: Gpu) -> int:
    """Bytes that a training needs on a GPU, with its layers checkpointed if it would not fit otherwise."""
    predicted = predicted_for(recipe, task, labels, gpu.device)
    if predicted is not None and predicted.total > gpu.free and recipe.train.checkpoint_layers is None:
        predicted = predicted_for(recipe, task, labels, gpu.device, checkpointed=True) or predicted
    if predicted is not None:
        return predicted.total
    packed = recipe.base_quantization is not None
    room = room_to_answer(bases.resolve(recipe.base), dtype_on(gpu.device, recipe.train.dtype), packed=packed)
    return round(UNPREDICTED * room)


# --- base -------------------------------------------------------------------------------------------------------------


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
    head, outputs, dtype, seed = task.head, task.num_labels(labels), recipe.train.dtype, recipe.seed
    if recipe.train.shard is not None:
        mesh = distributed.mesh()
        return load_in_parts(
            recipe.base, task=head, mesh=mesh, device=device, num_labels=outputs, dtype=dtype, seed=seed
        )
    return bases.load(
        recipe.base,
        task=head,
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
