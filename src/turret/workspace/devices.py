"""Choose the device of a training: a card takes it if the predicted memory of the whole training fits there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret import bases
from turret.bases import ChosenDevice, choose_device
from turret.bases.base import dtype_on
from turret.bases.device import Machine, this_machine
from turret.bases.skeleton import room_to_answer, skeleton
from turret.errors import AdapterError, PreflightRefused, UnknownFamily
from turret.recipe import Recipe
from turret.tasks import Task
from turret.train.card_memory import Work, predict_on_card, refusal
from turret.train.memory import Prediction

AUTO = "auto"
UNPREDICTED = 1.5  # times the room to answer: a training whose memory cannot be predicted from shapes


def choose_for(recipe: Recipe, task: type[Task], labels: Sequence[str], machine: Machine | None = None) -> ChosenDevice:
    """The device of a training, before its base is read.

    Args:
        recipe: `train.device` names the device; None: auto.
        task: of the data.
        labels: of a classifier.
        machine: the devices to choose from; None: those of this machine.

    Raises:
        DeviceError: the device is not there.
        PreflightRefused: the weights and the trained states do not fit on the card that the recipe names.
    """
    name = recipe.train.device or AUTO
    if name in ("cpu", "mps"):
        return choose_device(name, machine=machine)
    machine = this_machine() if machine is None else machine
    chosen = choose_device(name, lambda at: _needed(recipe, task, labels, at), machine)
    card = next((card for card in machine.cards if card.device == chosen.device), None)
    if card is not None and name != AUTO:
        predicted = predicted_for(recipe, task, labels, card.device)
        problem = None if predicted is None else refusal(predicted, card.free, recipe.base, str(card.device))
        if problem is not None:
            raise PreflightRefused(problem)
    return chosen


def predicted_for(recipe: Recipe, task: type[Task], labels: Sequence[str], device: torch.device) -> Prediction | None:
    """The predicted memory of a recipe's training on a card; None if it cannot be told from shapes alone.

    Raises:
        BaseModelError: the base cannot be found.
    """
    source = bases.resolve(recipe.base)
    try:
        model = skeleton(source, task.request, task.num_labels(labels))
        work = Work.of(recipe, model, generates=task.generates)
        return predict_on_card(
            model,
            recipe.method,
            work,
            dtype_on(device, recipe.train.dtype),
            nf4=recipe.base_quantization == "nf4",
            optimizer=recipe.train.optimizer,
            checkpointed=bool(recipe.train.checkpoint_layers),
        )
    except (UnknownFamily, AdapterError, NotImplementedError, RuntimeError, TypeError):
        return None  # such as a module that needs numbers; the plan measures it on the card


def _needed(recipe: Recipe, task: type[Task], labels: Sequence[str], device: torch.device) -> int:
    predicted = predicted_for(recipe, task, labels, device)
    if predicted is not None:
        return predicted.total
    packed = recipe.base_quantization is not None
    room = room_to_answer(bases.resolve(recipe.base), dtype_on(device, recipe.train.dtype), packed=packed)
    return round(UNPREDICTED * room)
