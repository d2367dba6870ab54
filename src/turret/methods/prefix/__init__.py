"""The method `prefix`."""

from turret.methods.prefix.spec import Prefix

__all__ = ["Prefix"]
