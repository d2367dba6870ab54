"""A base in memory that answers with the versions of a store: the engine and where it gets them from.

Refuses to know HTTP, and how an engine works.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from turret import adapters, bases, bundles
from turret.bases.base import Dtype
from turret.engine import Engine, Limits, Named
from turret.errors import NotFound
from turret.families import FAMILIES
from turret.reference import Reference
from turret.store import Store

REMEMBERED = 4096  # versions
FRESH = 1.0  # seconds that a version is taken to be there still; what `name@3` is never changes


class StoreSource:
    """The versions of a store, hashed on their way out of it (`turret.engine.adapter_source.Source`).

    `name@3` is one digest for ever, so it is looked up once a second however often it is asked for; aliases and plain
    names are looked up each time. A version that is deleted is refused a second later at most.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, Named]] = OrderedDict()  # reference -> (until when, what it is)

    def resolve(self, reference: str) -> Named:
        """What the reference means now. Raises NotFound."""
        with self._lock:
            until, named = self._known.get(reference, (0.0, None))
        if named is not None and self._clock() < until:
            return named
        asked = self._clock()
        version = self._store.resolve(reference)
        named = Named(version.name, version.number, version.digest, version.bytes)
        if reference == str(named):
            self._keep(reference, asked + FRESH, named)
        return named

    def _forget(self, reference: str) -> None:
        with self._lock:
            self._known.pop(reference, None)

    def _keep(self, reference: str, until: float, named: Named) -> None:
        with self._lock:
            self._known[reference] = until, named
            self._known.move_to_end(reference)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def load(self, named: Named) -> adapters.Adapter:
        """Read the version. Raises Corrupt for damaged files, NotFound for one that was deleted meanwhile."""
        with tempfile.TemporaryDirectory(prefix="turret-") as folder:
            bundle = Path(folder) / "bundle"
            try:
                self._store.materialize(Reference(named.name, version=named.number), bundle)
            except NotFound:
                self._forget(str(named))
                raise
            return bundles.read_bundle(bundle)


def engine(
    store: Store, base: str, limits: Limits | None, dtype: Dtype, stage: Callable[[str], None] | None = None
) -> Engine:
    """Load the base for all that it can do, and put an engine on it."""
    if stage is not None:
        stage(f"loading {base}")
    family = FAMILIES.get(str(bases.resolve(base).config.get("model_type")))
    generates = family is not None and family.generates  # an unknown family is an error of `load`
    loaded = bases.load(base, task="generate" if generates else "classify", dtype=dtype)
    return Engine(loaded, StoreSource(store), limits)
