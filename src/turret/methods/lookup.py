"""From a method's settings to its tensors. Loads torch only when it is asked."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from turret.methods.method import Method

if TYPE_CHECKING:
    from turret.methods.numbers import MethodNumbers


def numbers_of(method: Method) -> MethodNumbers[Method]:
    """What this method does with tensors: the class that its `numbers_at` names."""
    module, _, name = method.numbers_at.partition(":")
    found: type[MethodNumbers[Method]] = getattr(import_module(module), name)
    return found(method)
