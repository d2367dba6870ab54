"""The method `full`."""

from turret.methods.full.spec import Full

__all__ = ["Full"]
