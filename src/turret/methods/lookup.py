"""From a method's settings to its tensors. Loads torch when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from turret.methods.method import Method

if TYPE_CHECKING:
    from turret.methods.tuner import Tuner


def tuner_of(method: Method) -> Tuner[Method]:
    """The tensors of this method: an instance of the class that `numbers_at` names."""
    module, _, name = method.numbers_at.partition(":")
    numbers: type[Tuner[Method]] = getattr(import_module(module), name)
    return numbers(method)
