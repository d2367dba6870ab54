"""The method `peft`."""

from turret.methods.peft.spec import Peft

__all__ = ["Peft"]
