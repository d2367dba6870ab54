"""Where the engine gets its versions from: two questions that somebody else answers. Refuses to know who."""

from __future__ import annotations

from typing import Protocol

from turret.adapters import Adapter
from turret.engine.request import Named


class AdapterSource(Protocol):
    """Where versions come from."""

    def resolve(self, reference: str) -> Named:
        """What the reference means now. Raises NotFound."""
        ...

    def load(self, named: Named) -> Adapter:
        """Blocking; called on the loader's thread. Raises TurretError."""
        ...
