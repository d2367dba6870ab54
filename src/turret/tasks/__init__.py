"""The axis of tasks: classify, summarize and generate, a file each, and the table that all else asks.

A new task is a class with what `Task` lists, under `@register`. Importing the package loads no torch.
"""

from turret.tasks.classify import Classify
from turret.tasks.generate import Generate, Summarize
from turret.tasks.task import (
    TASKS,
    Encoded,
    HeadTask,
    Task,
    TextTask,
    has_head,
    make_task,
    register,
    schemas,
    stored_task,
    task_from_spec,
    task_of,
    writes,
)

__all__ = [
    "TASKS",
    "Classify",
    "Encoded",
    "Generate",
    "HeadTask",
    "Summarize",
    "Task",
    "TextTask",
    "has_head",
    "make_task",
    "register",
    "schemas",
    "stored_task",
    "task_from_spec",
    "task_of",
    "writes",
]
