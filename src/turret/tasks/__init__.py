"""The axis of tasks: one class for each, and a table of them. Loads no torch.

A new task is a class with the methods of `Task`, decorated with `@register`.
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
    ComparingTask,
    Decision,
    Embedding,
    Encoded,
    Measure,
    Mistake,
    Prediction,
    QuestionType,
    Task,
    chances,
    compares,
    main_metric,
    make_task,
    measure_of,
    measuring,
    register,
    schemas,
    stored_task,
    task_from_spec,
    task_of,
)
from turret.tasks.text_pairs import TextPairs
from turret.tasks.token_classification import TokenClassification

__all__ = [
    "TASKS",
    "Chat",
    "Classify",
    "ComparingTask",
    "Decision",
    "Embedding",
    "Encoded",
    "Generate",
    "Measure",
    "Mistake",
    "Prediction",
    "Preference",
    "QuestionType",
    "Questions",
    "Regression",
    "Rerank",
    "Score",
    "Summarize",
    "Task",
    "TextEmbedding",
    "TextPairs",
    "TokenClassification",
    "chances",
    "compares",
    "main_metric",
    "make_task",
    "measure_of",
    "measuring",
    "register",
    "schemas",
    "stored_task",
    "task_from_spec",
    "task_of",
]
