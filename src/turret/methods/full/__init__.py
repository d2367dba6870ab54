"""The method `full`."""

from turret.methods.full.config import Full

__all__ = ["Full"]
