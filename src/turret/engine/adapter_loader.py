"""Which adapters are in memory, and how others get there: loaded on a thread of their own, mounted between two passes.

Ties `Slots` (who may stay), a `Source` (where versions come from) and the bank (their numbers). Whoever needs an
adapter waits here until it is there. Refuses to know passes, texts and how a request goes on.

Every public method is called with the engine's lock held; the loader takes it itself. What a pass reads changes in
`between_passes` alone, which the engine's thread calls.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, Protocol

from turret.engine.adapter_pool import AdapterPool
from turret.engine.adapter_source import AdapterSource
from turret.engine.adapter_tensors import AdapterTensors
from turret.engine.request import LoadedAdapter, Named
from turret.engine.slots import Entry, Slots
from turret.errors import AdapterError, NoRoom, NotFound, TurretError
from turret.kernels import rest
from turret.tasks import task_from_spec

TASKS = 64  # that adapters share, where they say the same of theirs
SEAT_PATIENCE = 1.0  # seconds after which one that waits for a slot goes before others whose adapter is there


class Need(Protocol):
    """Whoever waits for an adapter: a request, or a call to `warm`."""

    named: Any
    arrived: float
    entry: Any


@dataclass(eq=False)
class Warm:
    """A call that wants an adapter in memory and nothing more."""

    named: Named
    arrived: float
    pin: bool
    done: Future[Entry] = field(default_factory=Future)
    entry: Any = None


@dataclass(eq=False)
class _Coming:
    """An adapter that is being loaded."""

    named: Named
    entry: Entry
    needs: list[Need] = field(default_factory=list)
    loaded: AdapterTensors | None = None
    error: TurretError | None = None


class AdapterLoader:
    """encode(need, loaded) does what can be done for a need before its adapter is mounted; it raises nothing."""

    def __init__(
        self,
        adapter_pool: AdapterPool,
        slots: Slots,
        source: AdapterSource,
        tokenizer: Any,
        wake: Condition,
        clock: Callable[[], float],
        encode: Callable[[Need, AdapterTensors], None],
    ) -> None:
        self._bank, self._slots, self._source = adapter_pool, slots, source
        self._task = functools.lru_cache(TASKS)(lambda spec: task_from_spec(json.loads(spec), tokenizer))
        self._wake, self._clock, self._encode = wake, clock, encode
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="turret-loader")
        self._waiting: deque[Need] = deque()  # for a slot
        self._coming: dict[str, _Coming] = {}
        self._arrived: deque[_Coming] = deque()
        self._leaving: list[int] = []
        self._released = False
        self._names: dict[str, Named] = {}  # as each digest was last asked for
        self._times: dict[str, float] = {}
        self.loads = self.failed_loads = 0

    # --- needs --------------------------------------------------------------------------------------------------------

    def need(self, need: Need) -> AdapterTensors | None:
        """What it needs, held for it; or None, and it is told between two passes. Raises NoRoom for what never fits."""
        named: Named = need.named
        first = self._waiting[0] if self._waiting else None
        impatient = first is not None and self._clock() - first.arrived > SEAT_PATIENCE
        if impatient or not self._seat(need):
            self._waiting.append(need)
        elif need.entry.ready:
            self._touch(named)
            return self._bank.at(need.entry.slot)
        return None

    def release(self, need: Need) -> None:
        """It needs its adapter no longer, whether it is there yet or not."""
        if need.entry is None:
            if need in self._waiting:
                self._waiting.remove(need)
            return
        coming = self._coming.get(need.entry.digest)
        if coming is not None and need in coming.needs:
            coming.needs.remove(need)
        self._slots.release(need.entry)
        need.entry = None
        self._released = True
        if self._waiting:
            self._wake.notify_all()

    def entry(self, named: Named) -> Entry:
        """The slot that a version is ready in. Raises NotFound."""
        entry = self._slots.find(named.digest)
        if entry is None or not entry.ready:
            raise NotFound(f"{named} is not loaded here: see `loaded()`")
        return entry

    def loaded(self) -> list[LoadedAdapter]:
        """All that are ready, the one that was used last first."""
        return [
            LoadedAdapter(
                version=str(self._names[entry.digest]),
                digest=entry.digest,
                slot=entry.slot,
                bytes=entry.bytes,
                pinned=entry.pinned,
                last_used=self._times[entry.digest],
                requests=entry.holds,
            )
            for entry in sorted(self._slots.entries(), key=lambda each: -each.used)
            if entry.ready
        ]

    def unload(self, entry: Entry) -> None:
        """Put an idle adapter out."""
        self._slots.close(entry)
        self._leave(entry)
        self._wake.notify_all()

    @property
    def pending(self) -> bool:
        """Whether `between_passes` has something to do."""
        return bool(self._arrived or self._leaving or (self._waiting and self._released))

    def between_passes(self) -> tuple[list[tuple[Need, AdapterTensors]], list[tuple[Need, TurretError]]]:
        """Take out what leaves, mount what has arrived, seat who waits: (who can go on, who cannot)."""
        ready: list[tuple[Need, AdapterTensors]] = []
        failed: list[tuple[Need, TurretError]] = []
        for slot in self._leaving:
            self._bank.unmount(slot)
        self._leaving.clear()
        while self._arrived:
            self._mount(self._arrived.popleft(), ready, failed)
        self._released = False
        for _ in range(len(self._waiting)):
            need = self._waiting.popleft()
            try:
                seated = self._seat(need)
            except NoRoom as error:
                failed.append((need, error))
                continue
            if not seated:
                self._waiting.append(need)
                if len(self._waiting) > 1 and self._clock() - need.arrived > SEAT_PATIENCE:
                    self._waiting.rotate(1)  # it stays the first, and nobody is seated before it
                    break
            elif need.entry.ready:
                loaded = self._bank.at(need.entry.slot)
                assert loaded is not None
                self._touch(need.named)
                ready.append((need, loaded))
        for slot in self._leaving:  # put out for those who were seated just now
            self._bank.unmount(slot)
        self._leaving.clear()
        return ready, failed

    def abandon(self) -> list[Need]:
        """Everybody who waits for an adapter: none of them will be told any more."""
        return [*self._waiting, *(need for coming in self._coming.values() for need in coming.needs)]

    def close(self) -> None:
        """No load begins any more; one under way is waited for, without the lock."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    # --- the inside ---------------------------------------------------------------------------------------------------

    def _seat(self, need: Need) -> bool:
        """Hold the adapter for it, beginning its load where it is not there; False while there is no room."""
        named: Named = need.named
        entry = self._slots.find(named.digest)
        if entry is None:
            entry, evicted = self._slots.open(named.digest, named.bytes)
            for each in evicted:
                self._leave(each)
            if entry is None:
                return False
            coming = self._coming[named.digest] = _Coming(named, entry)
            self._loader.submit(self._load, coming)
            self._wake.notify_all()  # who runs the passes makes ready meanwhile
        self._slots.hold(entry)
        need.entry = entry
        if not entry.ready:
            self._coming[named.digest].needs.append(need)
        return True

    def _load(self, coming: _Coming) -> None:
        """On the loader's thread: read, check and lay out; nothing that a pass reads is touched."""
        try:
            adapter = self._source.load(coming.named)
            if not adapter.task:
                raise AdapterError(f"{coming.named} says nothing of its task: it cannot answer; train it again")
            task = self._task(json.dumps(adapter.task))
            coming.loaded = self._bank.prepare(adapter, coming.named.digest, task)
            with self._wake:
                needs = list(coming.needs)
            for need in needs:  # here, so that the passes of others are not kept waiting for a tokenizer
                self._encode(need, coming.loaded)
        except TurretError as error:
            coming.error = error
        except Exception as error:  # whatever a source trips over fails its own requests only
            coming.error = AdapterError(
                f"{coming.named} cannot be loaded ({type(error).__name__}: {error}): look at it"
            )
        rest()
        with self._wake:
            self._arrived.append(coming)
            self._wake.notify_all()

    def _mount(
        self, coming: _Coming, ready: list[tuple[Need, AdapterTensors]], failed: list[tuple[Need, TurretError]]
    ) -> None:
        entry, loaded, error = coming.entry, coming.loaded, coming.error
        del self._coming[entry.digest]
        evicted: list[Entry] | None = []
        if loaded is not None:
            evicted = self._slots.filled(entry, loaded.bytes)
            if evicted is None:
                error = NoRoom(
                    f"{coming.named} takes {loaded.bytes:,} bytes and what is in use leaves less of the limit of "
                    f"memory ({self._slots.memory:,}): raise it, or ask again later"
                )
        else:
            self._slots.close(entry)
        if error is not None or loaded is None or evicted is None:
            assert error is not None
            self.failed_loads += 1
            for need in coming.needs:
                need.entry = None
                failed.append((need, error))
            return
        for each in evicted:
            self._bank.unmount(each.slot)
            self._forget(each)
        self._bank.mount(entry.slot, loaded)
        self.loads += 1
        self._touch(coming.named)
        ready += [(need, loaded) for need in coming.needs]

    def _leave(self, entry: Entry) -> None:
        self._leaving.append(entry.slot)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        self._names.pop(entry.digest, None)
        self._times.pop(entry.digest, None)

    def _touch(self, named: Named) -> None:
        self._names[named.digest] = named
        self._times[named.digest] = self._clock()
