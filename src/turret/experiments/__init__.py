"""Experiments: split live traffic between versions of one adapter, record outcomes, and decide which version is better.

numpy is imported only to analyze an experiment. Assigning units and recording outcomes do not need it.
"""

from turret.experiments.experiment import Experiment, Guards
from turret.experiments.outcomes import Recorded
from turret.experiments.router import Assignment, Router, Told

__all__ = ["Assignment", "Experiment", "Guards", "Recorded", "Router", "Told"]
