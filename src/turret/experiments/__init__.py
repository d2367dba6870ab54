"""Live traffic split between versions of one adapter: who sees which, what came of it, and what that proves.

Refuses to know the store's files, models, torch and HTTP. Numpy is loaded where evidence is weighed, not before:
assigning a unit and recording an outcome need none.
"""

from turret.experiments.experiment import Arm, Experiment, Guards, Metric
from turret.experiments.outcomes import Recorded
from turret.experiments.router import Assignment, Router, Told

__all__ = ["Arm", "Assignment", "Experiment", "Guards", "Metric", "Recorded", "Router", "Told"]
