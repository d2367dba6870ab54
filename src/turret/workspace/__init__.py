"""The one object a program opens: a store, and the verbs that cross rooms. Refuses to know HTTP and the terminal.

Importing it loads no torch: each verb loads what it needs.
"""

from turret.workspace.core import Workspace
from turret.workspace.results import Evaluation, Exported, Imported, Planned, RunResult

__all__ = ["Evaluation", "Exported", "Imported", "Planned", "RunResult", "Workspace"]
