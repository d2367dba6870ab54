"""The interface that the engine loads adapters through."""

from __future__ import annotations

from typing import Protocol

from turret.adapters import Adapter
from turret.engine.request import Named


class AdapterSource(Protocol):
    """A collection of stored adapters."""

    def resolve(self, reference: str) -> Named:
        """The version that a reference names now. Raises NotFound."""
        ...

    def load(self, named: Named) -> Adapter:
        """The adapter of a version. May block: the loader's thread calls it. Raises TurretError."""
        ...
