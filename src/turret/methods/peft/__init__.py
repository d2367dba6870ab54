"""The method `peft`."""

from turret.methods.peft.config import Peft

__all__ = ["Peft"]
