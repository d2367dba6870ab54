"""Load a base for serving, with an engine that reads its adapters from a store."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256

from turret import adapters, bases
from turret.access import Access, check_tenant
from turret.bases.base import Dtype
from turret.bases.quantized import Quantization
from turret.bases.sharded import load_without_weights
from turret.engine.core import Engine
from turret.engine.request import Limits, Named, VllmServer
from turret.engine.vllm import Vllm
from turret.errors import AdapterError, DeviceError, NotFound
from turret.families import FAMILIES
from turret.reference import Reference, parts_of
from turret.store import Store
from turret.workspace.progress import Say, silent
from turret.workspace.resident import read_adapter

log = logging.getLogger("turret.serving")
REMEMBERED = 4096  # versions
VLLM_ROWS = 256  # that a vLLM server answers at a time: more wait here, in turns of tenants
FRESH = 1.0  # seconds for which a resolved `name@3` is used without asking the store again


class StoreSource:
    """Gives an engine the versions of a store (`turret.engine.adapter_loader.AdapterSource`).

    `name@3` is a version of the store's own tenant, `legal/name@3` one of the tenant `legal`: a server writes that.

    A numbered version never changes its digest, so `name@3` is resolved at most once per second. Aliases and plain
    names are resolved on every request. A deleted version is refused after one second at most.
    """

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.monotonic, quantization: Quantization | None = None
    ) -> None:
        """quantization: of the base that serves; None: not known, so nothing is said about it."""
        self._store, self._clock, self._quantization = store, clock, quantization
        self._stores = {"": store}  # tenant -> the store as it sees it
        self._said: set[str] = set()  # digests of versions that were trained on another quantization
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, Named]] = OrderedDict()  # reference -> (valid until, version)

    def resolve(self, reference: str) -> Named:
        """The version that a reference means now. Raises NotFound."""
        tenant, slash, own = reference.rpartition("/")
        if "+" in own:
            return self._composition([self.resolve(f"{tenant}{slash}{part}") for part in parts_of(own)])
        with self._lock:
            until, named = self._known.get(reference, (0.0, None))
        if named is not None and self._clock() < until:
            return named
        started = self._clock()
        version = self._seen_by(check_tenant(tenant) if slash else "").resolve(own)
        named = Named(version.name, version.number, version.digest, version.bytes, tenant)
        if own == str(named):
            self._remember(reference, started + FRESH, named)
        return named

    def _composition(self, parts: Sequence[Named]) -> Named:
        """Several versions as one. Its name has all but the number of the last: `str` of it is `legal@3+formal@2`."""
        name, last = "+".join([*map(str, parts[:-1]), parts[-1].name]), parts[-1]
        whole = sha256("+".join(part.digest for part in parts).encode()).hexdigest()
        return Named(name, last.number, f"sha256:{whole}", sum(part.bytes for part in parts), last.tenant)

    def load(self, named: Named) -> adapters.Adapter:
        """Read a version and check its files; of a composition, all. Raises Corrupt, or NotFound if one was deleted."""
        if "+" not in named.name:
            return self._load(named)
        start = f"{named.tenant}/" if named.tenant else ""
        first, *others = (self._load(self.resolve(f"{start}{part}")) for part in parts_of(str(named)))
        return replace(first, others=tuple(others))

    def _load(self, named: Named) -> adapters.Adapter:
        try:
            adapter = read_adapter(self._seen_by(named.tenant), Reference(named.name, version=named.number))[1]
        except NotFound:
            self._forget(f"{named.tenant}/{named}" if named.tenant else str(named))
            raise
        method, family = adapter.method, FAMILIES.get(adapter.base.family or "")
        if family is not None and not method.mixes(method.model_dump()):
            raise AdapterError(str(method.refusal("mix", family, not adapter.head)))
        self._say_quantization(named, adapter)
        return adapter

    def _seen_by(self, tenant: str) -> Store:
        if tenant not in self._stores:
            self._stores[tenant] = self._store.with_access(Access(tenant))
        return self._stores[tenant]

    def _say_quantization(self, named: Named, adapter: adapters.Adapter) -> None:
        """Warn once of a version that was trained on other weights than those that serve."""
        trained = adapter.base.quantization or "none"
        if self._quantization in (None, trained) or named.digest in self._said:
            return
        self._said.add(named.digest)
        log.warning(
            "%s was trained on base_quantization %s and is served on %s: its answers differ a little from those that "
            "were measured; for equal ones serve with --base-quantization %s",
            named,
            trained,
            self._quantization,
            trained,
        )

    def _remember(self, reference: str, until: float, named: Named) -> None:
        with self._lock:
            self._known[reference] = until, named
            self._known.move_to_end(reference)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def _forget(self, reference: str) -> None:
        with self._lock:
            self._known.pop(reference, None)


def engine(
    store: Store,
    base: str,
    limits: Limits | None,
    dtype: Dtype,
    say: Say = silent,
    *,
    quantization: Quantization = "none",
    device: str = "auto",
) -> Engine:
    """Load a base, for generation if its family generates, else for classification, and start an engine on it.

    Raises:
        DeviceError: the device is not there, is too small for the base, or is `mps`.
    """
    if device == "mps":
        raise DeviceError("an engine does not run on mps: expected cpu or cuda; mps trains and predicts only")
    say(f"loading {base}")
    loaded = bases.load(base, dtype=dtype, quantization=quantization, device=device)
    for text in loaded.notes:
        say(text)
    return Engine(loaded, StoreSource(store, quantization=quantization), limits)


def vllm_engine(
    store: Store, base: str, *, server: VllmServer, limits: Limits | None = None, on_stage: Say = silent
) -> Engine:
    """Start an engine whose answers a vLLM server computes. The base's weights are not loaded here.

    Raises:
        BaseModelError: the base is not listed, or generates no text.
        ServeRefused: vLLM does not answer, or serves another base.
    """
    on_stage(f"reading {base}")
    loaded = load_without_weights(base)
    for text in loaded.notes:
        on_stage(text)
    vllm = Vllm(loaded, server)
    limits = replace(limits or Limits(), max_tokens=vllm.longest, running=VLLM_ROWS)
    return Engine(loaded, StoreSource(store), limits, vllm=vllm)
