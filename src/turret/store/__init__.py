"""Where adapters live: immutable numbered versions, content-addressed files, runs. Refuses to know models and torch."""

from turret.store.aliases import Move, Pointing
from turret.store.catalog import Deleted, Version, acting
from turret.store.core import Store
from turret.store.gates import Gate
from turret.store.gc import Collected
from turret.store.golden import Example, Golden, GoldenSet, Replay
from turret.store.runs import Run
from turret.store.standing import Standing
from turret.store.tokens import Token, Tokens
from turret.store.verify import Verified

__all__ = [
    "Collected",
    "Deleted",
    "Example",
    "Gate",
    "Golden",
    "GoldenSet",
    "Move",
    "Pointing",
    "Replay",
    "Run",
    "Standing",
    "Store",
    "Token",
    "Tokens",
    "Verified",
    "Version",
    "acting",
]
