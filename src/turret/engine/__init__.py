"""One frozen base in memory and the adapters on it: requests, who goes next, mixed passes, decoding.

Knows adapters, bases and tasks. Refuses to know the store (it is given a `Source`), HTTP and files. Importing the
package loads no torch; `Engine` does, when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turret.engine.request import (
    Done,
    Event,
    Failed,
    Kind,
    Limits,
    LoadedAdapter,
    Named,
    Options,
    Piece,
    Receipt,
    Stats,
    Ticket,
    VersionStats,
)

if TYPE_CHECKING:
    from turret.engine.core import Engine

__all__ = [
    "Done",
    "Engine",
    "Event",
    "Failed",
    "Kind",
    "Limits",
    "LoadedAdapter",
    "Named",
    "Options",
    "Piece",
    "Receipt",
    "Stats",
    "Ticket",
    "VersionStats",
]


def __getattr__(name: str) -> object:
    if name != "Engine":
        raise AttributeError(f"module 'turret.engine' has no attribute {name!r}")
    from turret.engine.core import Engine

    globals()[name] = Engine
    return Engine
