"""What a training has in memory before its first step."""

from __future__ import annotations

from dataclasses import dataclass

from turret import train as trainer
from turret.bases import Base, ChosenDevice
from turret.data import Dataset
from turret.recipe import Recipe
from turret.tasks import Task


@dataclass(frozen=True)
class PreparedTraining:
    """Everything that a training needs, in memory."""

    recipe: Recipe  # with every default filled in
    dataset: Dataset
    base: Base
    task: Task
    notes: list[str]
    load_seconds: float
    resident: int  # bytes of the process after the base was loaded
    start: trainer.InitialAdapter | None  # the version that `train.init_from` names
    device: ChosenDevice  # where the base is, and why

    @property
    def parts(self) -> tuple[Recipe, Base, Task, Dataset]:
        """The positional arguments of `turret.train`'s functions."""
        return self.recipe, self.base, self.task, self.dataset
