"""The method `prefix`."""

from turret.methods.prefix.config import Prefix

__all__ = ["Prefix"]
