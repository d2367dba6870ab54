"""Loads adapters on a thread of its own, mounts them between two passes, and evicts others for them.

Requests wait here until their adapter is mounted. Public methods are called with the engine's lock; the loading thread
takes it. Only `between_passes`, on the engine's thread, changes what a pass reads.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from typing import TYPE_CHECKING, Protocol, TypeAlias

from turret.adapters.adapter import Adapter
from turret.engine.adapter_pool import AdapterPool, AdapterTensors
from turret.engine.request import LoadedAdapter, Named, Request
from turret.engine.slots import Entry, Slots
from turret.errors import AdapterError, NoRoom, NotFound, TurretError
from turret.ops.core import use_device
from turret.tasks.task import task_from_spec
from turret.transformer import Tokenizer
from turret.turns import Places, TurnQueue

if TYPE_CHECKING:
    from turret.engine.vllm import VllmAdapters

# --- adapter source ---------------------------------------------------------------------------------------------------
# The interface that the engine loads adapters through.


class AdapterSource(Protocol):
    """A collection of stored adapters."""

    def resolve(self, reference: str) -> Named:
        """The version that a reference names now. Raises NotFound."""
        ...

    def load(self, named: Named) -> Adapter:
        """The adapter of a version. May block: the loader's thread calls it. Raises TurretError."""
        ...


class WithAdaptersInMemory:
    """A source, or none, and adapters that are only in memory. Their names are never looked up."""

    def __init__(self, source: AdapterSource | None) -> None:
        self._source = source
        self.adapters: dict[str, Adapter] = {}  # by digest

    def resolve(self, reference: str | Named) -> Named:
        """The version that a reference names now; a `Named` is one already."""
        return reference if isinstance(reference, Named) else self._stored.resolve(reference)

    def load(self, named: Named) -> Adapter:
        """The adapter of a version, or the one in memory."""
        found = self.adapters.get(named.digest)
        return self._stored.load(named) if found is None else found

    @property
    def _stored(self) -> AdapterSource:
        if self._source is None:
            raise NotFound("this engine has no store: name an adapter that it holds in memory")
        return self._source


# --- adapter loader ---------------------------------------------------------------------------------------------------


SIZES = 1024  # most sizes kept of tensors that took more than their files
TASKS = 64  # most task objects kept; adapters with equal tasks share one
SLOT_PATIENCE = 1.0  # seconds; a need that waited longer for a slot goes before needs whose adapter is mounted


@dataclass(eq=False)
class Warm:
    """A call of `Engine.warm`."""

    named: Named
    arrived: float
    pin: bool
    done: Future[Entry] = field(default_factory=Future)
    entry: Entry | None = None


Need: TypeAlias = Request | Warm  # waits for an adapter


@dataclass(eq=False)
class _Loading:
    """An adapter that is being loaded."""

    named: Named
    entry: Entry
    needs: list[Need] = field(default_factory=list)
    loaded: AdapterTensors | None = None
    error: TurretError | None = None


class AdapterLoader:
    """The adapters in memory, and the needs that wait for others.

    Args:
        adapter_pool: Holds the tensors.
        slots: Decides which adapters stay.
        source: Loads adapters.
        tokenizer: Of the base, for the adapters' tasks.
        wake: The engine's lock; notified when there is work.
        clock: The engine's clock.
        encode: Called on the loading thread to encode a need's text before its adapter is mounted. Raises nothing.
    """

    def __init__(
        self,
        adapter_pool: AdapterPool | VllmAdapters,
        slots: Slots,
        source: AdapterSource,
        tokenizer: Tokenizer,
        wake: Condition,
        clock: Callable[[], float],
        encode: Callable[[Need, AdapterTensors], None],
    ) -> None:
        self._pool, self._slots, self._source = adapter_pool, slots, source
        self._task = functools.lru_cache(TASKS)(lambda spec: task_from_spec(json.loads(spec), tokenizer))
        self._wake, self._clock, self._encode = wake, clock, encode
        self._executor = ThreadPoolExecutor(1, "turret-loader", use_device, (adapter_pool.device,))
        self._to_load: TurnQueue[_Loading] = TurnQueue(Places(1, guests=0))
        self._waiting: deque[Need] = deque()  # for a slot
        self._loading: dict[str, _Loading] = {}
        self._loaded: deque[_Loading] = deque()
        self._evicted: list[int] = []  # slots to unmount before the next pass
        self._released = False
        self._uses: dict[str, tuple[Named, float]] = {}  # by key: as last requested, and when it was last used
        self._sizes: dict[str, int] = {}  # by key, of tensors that took more than was reserved
        self.loads = self.failed_loads = 0
        slots.on_taken, slots.on_room = self._on_taken, self._room

    # --- needs --------------------------------------------------------------------------------------------------------

    def need(self, need: Need) -> AdapterTensors | None:
        """Hold the adapter for a need.

        Returns:
            The adapter if it is mounted. Else None, and `between_passes` returns the need when it is.

        Raises:
            NoRoom: If the adapter can never fit.
        """
        before = self._clock() - SLOT_PATIENCE
        first = self._waiting[0] if self._waiting else None
        impatient = first is not None and first.arrived < before and not self._goes_before(need, first)
        entry = None if impatient or self._slots.gives_way(before) else self._hold(need)
        if entry is None:
            self._waiting.append(need)
            self._note_wait()
        elif entry.ready:
            self._touch(_named_version(need))
            return self._pool.at(entry.slot)
        return None

    def release(self, need: Need) -> None:
        """End a need, whether its adapter is mounted or not."""
        if need.entry is None:
            if need in self._waiting:
                self._waiting.remove(need)
                self._note_wait()
            return
        loading = self._loading.get(need.entry.digest)
        if loading is not None and need in loading.needs:
            loading.needs.remove(need)
        self._slots.release(need.entry)
        need.entry = None
        self._released = True
        if self._waiting:
            self._wake.notify_all()

    def entry(self, named: Named) -> Entry:
        """The slot of a version. Raises NotFound if it is not mounted."""
        entry = self._slots.find(named.key)
        if entry is None or not entry.ready:
            raise NotFound(f"{named} is not loaded here: see `loaded()`")
        return entry

    def loaded_adapters(self) -> list[LoadedAdapter]:
        """All mounted adapters, most recently used first."""
        return [
            LoadedAdapter(
                version=str(named),
                digest=named.digest,
                tenant=named.tenant,
                slot=entry.slot,
                bytes=entry.bytes,
                pinned=entry.pinned,
                last_used=last_used,
                requests=entry.holds,
            )
            for entry in sorted(self._slots.entries(), key=lambda each: -each.used)
            if entry.ready
            for named, last_used in [self._uses[entry.digest]]
        ]

    def unload(self, entry: Entry) -> None:
        """Evict an adapter that no request needs."""
        self._slots.close(entry)
        self._evict(entry)
        self._wake.notify_all()

    @property
    def pending(self) -> bool:
        """Whether `between_passes` has something to do."""
        return bool(self._loaded or self._evicted or (self._waiting and self._released))

    def between_passes(self) -> tuple[list[tuple[Need, AdapterTensors]], list[tuple[Need, TurretError]]]:
        """Unmount what was evicted, mount what was loaded, and give slots to needs that wait.

        Returns:
            Needs whose adapter is now mounted, with the adapter; and needs that failed, with the error.
        """
        ready: list[tuple[Need, AdapterTensors]] = []
        failed: list[tuple[Need, TurretError]] = []
        for slot in self._evicted:
            self._pool.unmount(slot)
        self._evicted.clear()
        while self._loaded:
            self._mount(self._loaded.popleft(), ready, failed)
        self._released = False
        self._take_turns()
        blocked: Need | None = None  # it has waited too long, and others get no slot before it
        for _ in range(0 if self._slots.gives_way(self._clock() - SLOT_PATIENCE) else len(self._waiting)):
            need = self._waiting.popleft()
            if blocked is not None and not self._goes_before(need, blocked):
                self._waiting.append(need)
                continue
            try:
                entry = self._hold(need)
            except NoRoom as error:
                failed.append((need, error))
                continue
            if entry is None:
                self._waiting.append(need)
                if self._clock() - need.arrived > SLOT_PATIENCE:
                    blocked = blocked or need
            elif entry.ready:
                loaded = self._pool.at(entry.slot)
                assert loaded is not None
                self._touch(_named_version(need))
                ready.append((need, loaded))
        self._note_wait()
        for slot in self._evicted:  # for the needs that got a slot in this call
            self._pool.unmount(slot)
        self._evicted.clear()
        return ready, failed

    def abandon(self) -> list[Need]:
        """Give up all needs that wait for an adapter, and return them; `between_passes` is not called again."""
        needs = [*self._waiting, *(need for loading in self._loading.values() for need in loading.needs)]
        self._waiting.clear()
        self._note_wait()
        return needs

    def close(self) -> None:
        """Start no more loads, wait for the current one, and free the memory. Called without the lock."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        with self._wake:
            self._slots.leave()

    # --- the inside ---------------------------------------------------------------------------------------------------

    def _hold(self, need: Need) -> Entry | None:
        """The slot of the need's adapter, held for it; starts the load if needed. None while no slot is free."""
        named = _named_version(need)
        entry = self._slots.find(named.key)
        if entry is None:
            entry, evicted = self._slots.open(named.key, self._size(named))
            for each in evicted:
                self._evict(each)
            if entry is None:
                return None
            loading = self._loading[named.key] = _Loading(named, entry)
            self._to_load.put(_tenant(need), loading)
            self._executor.submit(self._load_next)
            self._wake.notify_all()  # the engine's thread wakes its helper threads meanwhile
        self._slots.hold(entry)
        need.entry = entry
        if not entry.ready:
            self._loading[named.key].needs.append(need)
        return entry

    def _size(self, named: Named) -> int:
        """Bytes to reserve: those of its tensors if they were found to be more than those on disk."""
        return self._sizes.get(named.key, named.bytes)

    def _load_next(self) -> None:
        """Load the adapter whose tenant's turn it is. Runs on the loading thread."""
        with self._wake:
            found = self._to_load.take()
        if found is None:
            return
        tenant, loading = found
        began = self._clock()
        self._load(loading)
        with self._wake:
            self._to_load.end_turn(tenant, self._clock() - began)

    def _load(self, loading: _Loading) -> None:
        """Read, check and copy an adapter. Runs on the loading thread and changes nothing that a pass reads."""
        try:
            adapter = self._source.load(loading.named)
            if not adapter.task:
                raise AdapterError(f"{loading.named} stores no task, so it cannot answer: train it again")
            task = self._task(json.dumps(adapter.task))
            loading.loaded = self._pool.prepare(adapter, loading.named.key, task)
            with self._wake:
                needs = list(loading.needs)
            for need in needs:  # on this thread, so that passes do not wait for a tokenizer
                self._encode(need, loading.loaded)
        except TurretError as error:
            loading.error = error
        except Exception as error:  # an error of the source fails the requests of this adapter only
            loading.error = AdapterError(
                f"{loading.named} cannot be loaded ({type(error).__name__}: {error}): check the stored files"
            )
        with self._wake:
            self._loaded.append(loading)
            self._wake.notify_all()

    def _mount(
        self, loading: _Loading, ready: list[tuple[Need, AdapterTensors]], failed: list[tuple[Need, TurretError]]
    ) -> None:
        entry, loaded = loading.entry, loading.loaded
        del self._loading[entry.digest]
        if loaded is None:
            assert loading.error is not None
            self._slots.close(entry)
            self.failed_loads += 1
            for need in loading.needs:
                need.entry = None
                failed.append((need, loading.error))
            return
        evicted = self._slots.set_size(entry, loaded.bytes)
        if evicted is None:  # adapters in use leave too little for more than was reserved: the needs wait again
            self._sizes.pop(loading.named.key, None)
            self._sizes[loading.named.key] = loaded.bytes
            for key in list(self._sizes)[:-SIZES]:
                del self._sizes[key]
            for need in loading.needs:
                need.entry = None
            self._waiting.extendleft(reversed(loading.needs))
            return
        for each in evicted:
            self._pool.unmount(each.slot)
            self._uses.pop(each.digest, None)
        self._pool.mount(entry.slot, loaded)
        self.loads += 1
        self._touch(loading.named)
        ready += [(need, loaded) for need in loading.needs]

    def _take_turns(self) -> None:
        """Put the needs that wait for a slot in turns: the first one of each tenant, then the second ones."""
        if len({_tenant(need) for need in self._waiting}) > 1:
            counts: Counter[str] = Counter()
            turns = []
            for need in self._waiting:
                turns.append((counts[_tenant(need)], need))
                counts[_tenant(need)] += 1
            self._waiting = deque(need for _, need in sorted(turns, key=lambda each: each[0]))

    def _goes_before(self, need: Need, first: Need) -> bool:
        """Whether a need does not wait for the first one, because the tenant of that one holds more adapters."""
        ours, others = _named_version(need).tenant, _named_version(first).tenant
        return ours != others and self._count_held(ours) < self._count_held(others)

    def _count_held(self, tenant: str) -> int:
        """Adapters of a tenant that its requests need now."""
        return sum(each.holds > 0 and each.digest.rpartition("/")[0] == tenant for each in self._slots.entries())

    def _note_wait(self) -> None:
        """Tell the other engines of the budget since when a need waits for memory here."""
        first = self._waiting[0] if self._waiting else None
        short = first is not None and self._slots.short_of_memory(self._size(_named_version(first)))
        wait = first.arrived if first is not None and short else math.inf
        if wait != self._slots.wait:
            self._slots.wait = wait
            self._slots.budget.announce_room(self._slots)

    def _room(self) -> None:
        """Another engine of the budget may have freed memory. Called with the lock."""
        if self._waiting:
            self._released = True
            self._wake.notify_all()

    def _on_taken(self, entry: Entry) -> None:
        """An adapter was evicted for another engine of the budget. Called with the lock."""
        self._evict(entry)
        self._wake.notify_all()

    def _evict(self, entry: Entry) -> None:
        self._evicted.append(entry.slot)
        self._uses.pop(entry.digest, None)

    def _touch(self, named: Named) -> None:
        self._uses[named.key] = named, self._clock()


def _named_version(need: Need) -> Named:
    assert need.named is not None, "the bare base needs no adapter"
    return need.named


def _tenant(need: Need) -> str:
    return need.tenant if isinstance(need, Request) else _named_version(need).tenant
