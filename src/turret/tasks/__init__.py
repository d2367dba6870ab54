"""The axis of tasks: one class for each, and a table of them. Loads no torch.

A new task is a class with the methods of `HeadTask` or `TextTask`, decorated with `@register`.
"""

from turret.tasks.chat import Chat
from turret.tasks.classify import Classify
from turret.tasks.embedding import TextEmbedding
from turret.tasks.generate import Generate, Summarize
from turret.tasks.preference import Preference
from turret.tasks.questions import Questions
from turret.tasks.regression import Regression
from turret.tasks.rerank import Rerank
from turret.tasks.score import Score
from turret.tasks.task import (
    TASKS,
    CommonTask,
    ComparingTask,
    Embedding,
    Encoded,
    HeadTask,
    Measure,
    Mistake,
    Prediction,
    Task,
    TextTask,
    calibrates,
    compares,
    has_head,
    main_metric,
    make_task,
    measure_of,
    measuring,
    register,
    schemas,
    stored_task,
    task_from_spec,
    task_of,
    writes,
)
from turret.tasks.text_pairs import TextPairs
from turret.tasks.token_classification import TokenClassification

__all__ = [
    "TASKS",
    "Chat",
    "Classify",
    "CommonTask",
    "ComparingTask",
    "Embedding",
    "Encoded",
    "Generate",
    "HeadTask",
    "Measure",
    "Mistake",
    "Prediction",
    "Preference",
    "Questions",
    "Regression",
    "Rerank",
    "Score",
    "Summarize",
    "Task",
    "TextEmbedding",
    "TextPairs",
    "TextTask",
    "TokenClassification",
    "calibrates",
    "compares",
    "has_head",
    "main_metric",
    "make_task",
    "measure_of",
    "measuring",
    "register",
    "schemas",
    "stored_task",
    "task_from_spec",
    "task_of",
    "writes",
]
