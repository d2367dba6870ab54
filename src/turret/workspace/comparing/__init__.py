"""The comparing verb: every training of a design in a process of its own, then the verdicts and the report.

    compare(store, recipe, ComparisonRequest(...), ...)    the whole, in the calling process, which loads no torch
    prepare(store, recipe, ComparisonRequest(...), ...)    what would be trained, and which difference it could decide
    python -m turret.workspace.comparing.cell_worker FOLDER    one training or one look at the base

Refuses to know statistics and pages (`turret.compare`), and how a training is done (`workspace.training`).
"""

from turret.workspace.comparing.conduct import ComparisonRequest, compare, prepare

__all__ = ["ComparisonRequest", "compare", "prepare"]
