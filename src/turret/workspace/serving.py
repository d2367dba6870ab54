"""A base in memory that answers with the versions of a store: the engine and where it gets them from.

Refuses to know HTTP, and how an engine works.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from turret import adapters, bases
from turret.bases.load import Dtype
from turret.engine import Limits, Named
from turret.engine.engine import Engine
from turret.families import FAMILIES
from turret.reference import Reference
from turret.store import Store


class StoreSource:
    """The versions of a store, hashed on their way out of it (`turret.engine.source.Source`)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def resolve(self, reference: str) -> Named:
        """What the reference means now. Raises NotFound."""
        version = self._store.resolve(reference)
        return Named(version.name, version.number, version.digest, version.bytes)

    def load(self, named: Named) -> adapters.Adapter:
        """Read the version. Raises Corrupt for damaged files, NotFound for one that was deleted meanwhile."""
        with tempfile.TemporaryDirectory(prefix="turret-") as folder:
            bundle = Path(folder) / "bundle"
            self._store.materialize(Reference(named.name, version=named.number), bundle)
            return adapters.read_bundle(bundle)


def engine(
    store: Store, base: str, limits: Limits | None, dtype: Dtype, stage: Callable[[str], None] | None = None
) -> Engine:
    """Load the base for all that it can do, and put an engine on it."""
    if stage is not None:
        stage(f"loading {base}")
    family = FAMILIES.get(str(bases.resolve(base).config.get("model_type")))
    generates = family is not None and family.kind != "encoder"  # an unknown family is an error of `load`
    loaded = bases.load(base, task="generate" if generates else "classify", dtype=dtype)
    return Engine(loaded, StoreSource(store), limits)
