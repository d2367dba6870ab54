"""`Workspace`, the object that a program opens: a store, and every operation on it.

Importing it loads no torch: each method imports what it needs.
"""

from turret.store import Question
from turret.workspace.core import Workspace
from turret.workspace.results import Evaluation, Exported, Imported, Merged, Planned, Pushed, RunResult

__all__ = [
    "Evaluation",
    "Exported",
    "Imported",
    "Merged",
    "Planned",
    "Pushed",
    "Question",
    "RunResult",
    "Workspace",
]
