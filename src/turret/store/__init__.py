"""Where adapters live: immutable numbered versions, content-addressed files, runs. Refuses to know models and torch."""

from turret.store.catalog import Version
from turret.store.runs import Run
from turret.store.store import Store

__all__ = ["Run", "Store", "Version"]
