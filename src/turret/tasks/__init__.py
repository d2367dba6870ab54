"""The axis of tasks: one class for each, and a table of them. Loads no torch.

A new task is a class with the methods of `Task`, decorated with `@register`.
"""

from turret.tasks import (  # noqa: F401 (each module registers its tasks)
    chat,
    classify,
    embedding,
    generate,
    preference,
    questions,
    regression,
    rerank,
    score,
    text_pairs,
    token_classification,
)
from turret.tasks.task import (
    TASKS,
    ComparingTask,
    Decision,
    Embedding,
    Measure,
    Mistake,
    Prediction,
    QuestionType,
    Task,
    is_comparing,
    label_probabilities,
    main_metric,
    make_task,
    measure_of,
    register,
    schemas,
    stored_task,
    task_from_spec,
    task_measured_by,
    task_of,
)

__all__ = [
    "TASKS",
    "ComparingTask",
    "Decision",
    "Embedding",
    "Measure",
    "Mistake",
    "Prediction",
    "QuestionType",
    "Task",
    "is_comparing",
    "label_probabilities",
    "main_metric",
    "make_task",
    "measure_of",
    "register",
    "schemas",
    "stored_task",
    "task_from_spec",
    "task_measured_by",
    "task_of",
]
