"""The tensors of each method: one file a method, with its start, what is stored, and how it is mounted."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from turret.methods.method import Method

if TYPE_CHECKING:
    from turret.adapters.tuners.tuner import Tuner


def tuner_of(method: Method) -> Tuner[Method]:
    """The tensors of this method: an instance of the class that `tuner_at` names."""
    module, _, name = method.tuner_at.partition(":")
    tuner: type[Tuner[Method]] = getattr(import_module(module), name)
    return tuner(method)
