"""Every pass of a training after its last step: calibration, metrics, forgetting, and the probe for the proof.

With a base in parts all processes make these passes together; otherwise the main one makes them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from torch import Tensor

from turret import adapters
from turret import train as trainer
from turret.json_types import JsonObject
from turret.tasks import has_head, writes
from turret.tasks.calibration import FEWEST, FEWEST_TEMPERATURE
from turret.workspace import forgetting
from turret.workspace.progress import Say
from turret.workspace.ready import Ready


@dataclass(frozen=True)
class Measured:
    """The results of these passes. `ready` and `fitted` have the calibrated task."""

    ready: Ready
    fitted: trainer.Fitted
    metrics: dict[str, JsonObject]  # split -> metrics
    forgot: JsonObject | None  # on neutral text; None for a classifier
    probe: trainer.Probe
    seconds: float


def measured(ready: Ready, fitted: trainer.Fitted, say: Say, *, beside_base: bool) -> Measured:
    """Make the passes on the attached, trained model.

    Args:
        beside_base: measure the bare base on the held-out examples too.
    """
    say("measuring on held-out examples")
    started = time.perf_counter()
    ready, fitted, known = _calibrate(ready, fitted)
    metrics = _measure(ready, known=known)
    forgot = None
    if writes(ready.task):
        say("measuring forgetting")
        forgot = forgetting.on_neutral_texts(ready.base.model, ready.task.tokenizer).as_json()
    if beside_base:
        say("measuring the bare base on the same examples")
        bare = _measure(ready, slot=adapters.BARE)
        metrics |= {f"{split} bare base": values for split, values in bare.items()}
    seconds = time.perf_counter() - started
    examples = ready.dataset.test or ready.dataset.validation or ready.dataset.train
    probe = trainer.probe(ready.base.model, ready.task, examples)
    return Measured(ready, fitted, metrics, forgot, probe, seconds)


def uncalibrated(ready: Ready) -> list[str]:
    """The sentence of a classifier without enough validation examples for a calibration.

    The linear solution's folds cannot stand for them: an adapter is too sure because it was trained on its examples,
    and a temperature from folds of its own would cost as many trainings.
    """
    task, splits = ready.task, trainer.splits_of(ready.recipe, ready.dataset)
    count = len(splits.watched) if splits.selects and splits.watched else 0
    if not has_head(task) or not task.calibrates or count >= FEWEST:
        return []
    found = f"{count} validation examples" if count else "no validation split"
    return [
        f"probabilities are not calibrated ({found}) and are often too sure: set data.validation = 0.1, for "
        f"{FEWEST_TEMPERATURE} examples or more"
    ]


def _calibrate(ready: Ready, fitted: trainer.Fitted) -> tuple[Ready, trainer.Fitted, Tensor | None]:
    """Fit the task's calibration on the validation split, if there is one, and put it into the adapter.

    Returns:
        Both with the calibrated task, and the logits (B, C) of the data set's validation split.
    """
    task, splits = ready.task, trainer.splits_of(ready.recipe, ready.dataset)
    if not has_head(task) or not task.calibrates:
        return ready, fitted, None
    examples = splits.watched if splits.selects and splits.watched else ()
    if len(examples) < FEWEST:  # `uncalibrated` says it
        return ready, fitted, None
    most = trainer.pass_tokens(ready.recipe.train, ready.base.model.config)
    logits = trainer.head_logits(ready.base.model, task, examples, most_tokens=most)
    train = ready.recipe.train
    chose = train.keep == "best" or train.early_stopping is not None
    task = task.calibrated(logits, task.targets(examples), chose_weights=chose)
    adapter = replace(fitted.adapter, task=task.spec())
    known = logits if ready.dataset.validation else None
    return replace(ready, task=task), replace(fitted, adapter=adapter), known


def _measure(ready: Ready, slot: int | None = None, known: Tensor | None = None) -> dict[str, JsonObject]:
    """Metrics on every held-out split. known: the logits (B, C) of the validation split."""
    most = trainer.pass_tokens(ready.recipe.train, ready.base.model.config)
    splits = {"validation": (ready.dataset.validation, known), "test": (ready.dataset.test, None)}
    return {
        split: trainer.evaluate(ready.base.model, ready.task, examples, most_tokens=most, slot=slot, known=logits)[0]
        for split, (examples, logits) in splits.items()
        if examples
    }
