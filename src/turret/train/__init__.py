"""Training: the preflight, the training loop, its checkpoints, evaluation, and the proof of a written bundle.

filled(recipe, base, kind, examples) -> Recipe      the recipe with its defaults, which the next three need
plan(recipe, base, task, dataset) -> Plan           what a run will do and cost, and what is wrong with it
find_rate(recipe, base, task, dataset) -> FoundRate the learning rate for `lr = "auto"`
fit(recipe, base, task, dataset, folder=...)        a generator: yields a StepRecord per step, returns Fitted
Asking(base, adapter, task)                         metrics, texts and logits by the engine that serves
evaluate(model, task, examples)                     (metrics, answers) of an attached model, as it trains
probe(model, task, examples) -> Probe               the trained model's outputs for a few examples
prove(bundle, base, probe) -> report                a fresh process loads the bundle and must give those outputs
TrainingSlot(engine, name, method, kind=...)        an adapter that trains on an engine's base, one verb at a time
"""

from turret.methods.method import Check
from turret.train.asking import Asking
from turret.train.batches import pass_tokens, splits_of
from turret.train.checkpoint import step_of
from turret.train.curve import Curve, RunCurve, StepRecord, parse_curve, read_curve
from turret.train.evaluation import evaluate
from turret.train.initialize import filled, require_optimizer
from turret.train.loop import Fitted, fit
from turret.train.lr_finder import find_rate
from turret.train.preflight import plan
from turret.train.proof import Probe, probe, prove
from turret.train.slot import TrainingSlot
from turret.train.training_plan import FoundRate, Plan

__all__ = [
    "Asking",
    "Check",
    "Curve",
    "Fitted",
    "FoundRate",
    "Plan",
    "Probe",
    "RunCurve",
    "StepRecord",
    "TrainingSlot",
    "evaluate",
    "filled",
    "find_rate",
    "fit",
    "parse_curve",
    "pass_tokens",
    "plan",
    "probe",
    "prove",
    "read_curve",
    "require_optimizer",
    "splits_of",
    "step_of",
]
