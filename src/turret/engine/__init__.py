"""One frozen base in memory and the adapters on it: requests, who goes next, mixed passes, decoding.

Knows adapters, bases and tasks. Refuses to know the store (it is given a `Source`), HTTP and files. Importing the
package loads no torch; `turret.engine.engine` does.
"""

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

__all__ = [
    "Done",
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
