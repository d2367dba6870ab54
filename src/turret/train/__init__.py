"""Training: the preflight, the training loop, its checkpoints, evaluation, and the proof of a written bundle.

filled(recipe, base, kind, examples) -> Recipe      the recipe with its defaults, which the next three need
plan(recipe, base, task, dataset) -> Plan           what a run will do and cost, and what is wrong with it
find_rate(recipe, base, task, dataset) -> FoundRate the learning rate for `lr = "auto"`
fit(recipe, base, task, dataset, folder=...)        a generator: yields a StepRecord per step, returns Fitted
TrainingSlot(engine, name, method, kind=...)        an adapter that trains on an engine's base, one verb at a time

The modules `evaluation` and `asking` measure an adapter, as it trains and as it will serve. `proof` proves its bundle.
"""

from turret.train.initialize import fill_recipe
from turret.train.loop import fit
from turret.train.lr_finder import find_rate
from turret.train.preflight import plan
from turret.train.slot import TrainingSlot

__all__ = ["TrainingSlot", "fill_recipe", "find_rate", "fit", "plan"]
