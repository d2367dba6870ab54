"""One frozen base in memory that answers with any number of adapters: scheduling, mixed batches, KV cache, decoding.

Importing this package loads no torch; the first use of `Engine` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turret.engine.protocol import Loss, OptimStep
from turret.engine.request import (
    Ask,
    Done,
    Event,
    Failed,
    Limits,
    LoadedAdapter,
    Named,
    Piece,
    Receipt,
    Stats,
    Ticket,
)
from turret.engine.sampling_params import SamplingParams
from turret.engine.slots import MemoryBudget
from turret.tasks.task import Embedding

if TYPE_CHECKING:
    from turret.engine.core import Engine

__all__ = [
    "Ask",
    "Done",
    "Embedding",
    "Engine",
    "Event",
    "Failed",
    "Limits",
    "LoadedAdapter",
    "Loss",
    "MemoryBudget",
    "Named",
    "OptimStep",
    "Piece",
    "Receipt",
    "SamplingParams",
    "Stats",
    "Ticket",
]


def __getattr__(name: str) -> type[Engine]:
    if name != "Engine":
        raise AttributeError(f"module 'turret.engine' has no attribute {name!r}")
    from turret.engine.core import Engine

    globals()[name] = Engine
    return Engine
