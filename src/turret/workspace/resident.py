"""Where a training computes: in a process of its own, or beside others on a base that stays in memory.

Trainings on one resident base share its weights. Each has a model of its own, and one thread runs their steps in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from turret import bases, process
from turret.bases import Base, ChosenDevice
from turret.bases.base import dtype_on
from turret.bases.shared import share
from turret.engine.core import Engine
from turret.engine.pass_thread import PassThread
from turret.errors import TrainingError
from turret.recipe import Recipe
from turret.tasks import Task
from turret.workspace import prepared

T = TypeVar("T")
Key = tuple[Hashable, ...]  # the base's name first


def why_alone(recipe: Recipe) -> str | None:
    """Why a training cannot share its base with others; None if it can."""
    if recipe.train.shard is not None:
        return f'train.shard = "{recipe.train.shard}" divides the base among processes'
    if recipe.train.lr == "auto":
        return 'train.lr = "auto" runs trials first, which are measured alone'
    if recipe.method.every_weight:
        return f"method {recipe.method.kind} trains a copy of every weight"
    return None


class OwnProcess:
    """A process for one training: it loads its base, measures the plan, and proves the bundle in a fresh process."""

    stays: ClassVar[bool] = False  # whether the base stays in memory for others

    def model_for(self, recipe: Recipe, task: type[Task], labels: Sequence[str], device: ChosenDevice) -> Base:
        """A recipe's base, with nothing attached."""
        return prepared.load_base(recipe, task, labels, device)

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training that computes. tenant: whose training it is."""
        return work()


ALONE = OwnProcess()


@dataclass
class ResidentBases(OwnProcess):
    """The bases that stay in memory, and the thread that computes on them."""

    stays: ClassVar[bool] = True
    _thread: PassThread = field(default_factory=PassThread)
    _bases: dict[Key, Base] = field(default_factory=dict)

    def model_for(self, recipe: Recipe, task: type[Task], labels: Sequence[str], device: ChosenDevice) -> Base:
        """A recipe's base as a model of its own. Loads the base if it is not in memory, or changed on disk."""
        if (reason := why_alone(recipe)) is not None:
            raise TrainingError(f"this training cannot share its base: {reason}; run it in a process of its own")
        files = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in bases.resolve(recipe.base).weights]
        precision = dtype_on(device.device, recipe.train.dtype)
        key = (recipe.base, task.request, precision, recipe.base_quantization or "none", device.device, *files)
        return self.run(lambda: self._model(key, recipe, task, labels, device))

    def _model(self, key: Key, recipe: Recipe, task: type[Task], labels: Sequence[str], device: ChosenDevice) -> Base:
        if key not in self._bases:
            self._bases[key] = prepared.load_base(recipe, task, (), device)
        return share(self._bases[key], num_labels=task.num_labels(labels), seed=recipe.seed)

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training in the thread, when its tenant's turn comes."""
        return self._thread.run(work, tenant)

    def let_go(self, wanted: Collection[str]) -> None:
        """Free the bases whose name is not among those that are wanted."""
        self.run(lambda: self._let_go(wanted))

    def _let_go(self, wanted: Collection[str]) -> None:
        for key in [key for key in self._bases if key[0] not in wanted]:
            del self._bases[key]
        process.release()

    def close(self) -> None:
        """End the thread and free all bases. Trainings that still run raise Draining."""
        self._thread.close()
        self._bases.clear()


@dataclass
class ServingBase(OwnProcess):
    """The base that an engine serves: trainings take turns with its answers.

    Args:
        engine: gives the base and the thread.
        task: that its model was loaded for, "classify" or "generate".
    """

    engine: Engine
    task: str
    stays: ClassVar[bool] = True

    def model_for(self, recipe: Recipe, task: type[Task], labels: Sequence[str], device: ChosenDevice) -> Base:
        """The engine's base as a model of its own. Raises TrainingError if the recipe needs another one."""
        base = self.engine.base
        precision = dtype_on(base.model.device, recipe.train.dtype)
        wanted = (bases.resolve(recipe.base).folder, task.request, precision, recipe.base_quantization or "none")
        if (reason := why_alone(recipe)) is None and wanted != (base.folder, self.task, base.dtype, base.quantization):
            reason = f"it needs {recipe.base} for {task.request}, and {base.id} serves here in {base.dtype}"
        if reason is not None:
            raise TrainingError(f"this training cannot run beside these answers: {reason}; use turret worker")
        return self.run(lambda: share(base, num_labels=task.num_labels(labels), seed=recipe.seed))

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training between passes of answers."""
        return self.engine.run(work, tenant)
