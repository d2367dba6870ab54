"""Which adapter is in which slot: the least recently used is evicted first, within a limit of bytes.

An adapter is loading or ready. Memory is reserved before it is loaded, by its size on disk, and counted again by its
true size afterwards. Adapters that a request holds, or that are pinned, are never evicted.

Several engines may share one limit of bytes, a `MemoryBudget`. Then the least recently used adapter of all of them is
evicted first.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from turret.errors import DataError, NoRoom


class MemoryBudget:
    """A limit of bytes for the adapters of several engines together: `Limits(memory=MemoryBudget(2 * 10**9))` for each.

    The engines guard their slots with one lock, so one of them may evict an adapter of another.

    Args:
        limit: Bytes; None for no limit.

    Raises:
        DataError: The limit is not a whole number of 1 or more.
    """

    def __init__(self, limit: int | None) -> None:
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise DataError(f"limit memory = {limit!r}: expected a whole number of 1 or more")
        self.limit = limit
        self.lock = threading.RLock()
        self.members: list[Slots] = []  # of open engines
        self.uses = 0

    @property
    def bytes(self) -> int:
        """What all adapters take, those that are loading too."""
        return sum(each.bytes for each in self.members)

    def entries(self) -> list[Entry]:
        return [entry for each in self.members for entry in each.entries()]

    def announce_room(self, by: Slots) -> None:
        """Tell the other engines that there may be room for an adapter that waits."""
        for each in self.members:
            if each is not by:
                each.on_room()


@dataclass
class Entry:
    """A slot with an adapter in it."""

    digest: str  # with its tenant: `Named.key`
    slot: int
    bytes: int
    owner: Slots = field(repr=False, compare=False)
    ready: bool = False
    holds: int = 0  # requests that need it
    pinned: bool = False
    used: int = 0  # the count of uses at its last use

    @property
    def idle(self) -> bool:
        """Whether it may be evicted."""
        return self.ready and not self.holds and not self.pinned


class Slots:
    """`count` slots, numbered from 1, with at most `memory` bytes in them; None for no limit.

    Attributes:
        on_taken: Called with an entry that was evicted for another engine of the same budget.
        on_room: Called when another engine of the same budget may have freed memory.
        wait: When the first adapter came that waits for memory; infinite if none does.
    """

    def __init__(self, count: int, memory: int | MemoryBudget | None) -> None:
        self.count = count
        self.budget = memory if isinstance(memory, MemoryBudget) else MemoryBudget(memory)
        self.bytes = 0
        self.evictions = 0
        self.on_taken: Callable[[Entry], None] = lambda entry: None
        self.on_room: Callable[[], None] = lambda: None
        self.wait = math.inf
        self._entries: dict[str, Entry] = {}
        self._free = list(range(count, 0, -1))
        self.budget.members.append(self)

    @property
    def memory(self) -> int | None:
        """The limit of bytes, of all engines of the budget together."""
        return self.budget.limit

    def leave(self) -> None:
        """Give all bytes back to the budget: the engine ends."""
        self.budget.members.remove(self)
        self.budget.announce_room(self)

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def find(self, digest: str) -> Entry | None:
        """The slot of an adapter, loading or ready."""
        return self._entries.get(digest)

    def hold(self, entry: Entry) -> None:
        """Keep the adapter until `release`."""
        entry.holds += 1
        self._touch(entry)

    def release(self, entry: Entry) -> None:
        """Undo one `hold`."""
        assert entry.holds > 0
        entry.holds -= 1
        self._touch(entry)
        if not entry.holds:
            self.budget.announce_room(self)

    def open(self, digest: str, size: int) -> tuple[Entry | None, list[Entry]]:
        """Take a slot for an adapter that will be loaded.

        Args:
            digest: Of the adapter.
            size: Its bytes on disk.

        Returns:
            The slot and those evicted for it here; (None, []) while adapters in use leave too little memory.

        Raises:
            NoRoom: The adapter is larger than the limit, or than what pinned adapters leave of it.
        """
        assert digest not in self._entries
        self._check_possible(digest, size)
        evicted = self._make_room(size, slots=1)
        if evicted is None:
            return None, []
        entry = self._entries[digest] = Entry(digest, self._free.pop(), size, self)
        self.bytes += size
        self._touch(entry)
        return entry, evicted

    def set_size(self, entry: Entry, size: int) -> list[Entry] | None:
        """Set the true size of a loaded adapter.

        Returns:
            The slots evicted for what it takes more than reserved. None if that is impossible now; the slot is freed.
        """
        assert not entry.ready
        try:
            self._check_possible(entry.digest, size - entry.bytes)
            evicted = self._make_room(size - entry.bytes, slots=0)
        except NoRoom:
            evicted = None
        if evicted is None:
            self.close(entry)
            return None
        self.bytes += size - entry.bytes
        entry.bytes, entry.ready = size, True
        self._touch(entry)
        if entry.idle:
            self.budget.announce_room(self)
        return evicted

    def has_room(self, size: int) -> bool:
        """Whether an adapter of that many bytes fits beside those in memory, without evicting one."""
        return bool(self._free) and (self.memory is None or self.budget.bytes + size <= self.memory)

    def pin(self, entry: Entry) -> None:
        """Keep an adapter until it is unpinned.

        Raises:
            NoRoom: Pins of tenants would take more than half of the slots or of the memory, and the other half is for
                what is asked. Those of the operator, who sets the limits, may take all.
        """
        if not entry.pinned and "/" in entry.digest:
            pinned = [each for each in self.budget.entries() if each.pinned and "/" in each.digest]
            here, size = sum(each.owner is self for each in pinned), sum(each.bytes for each in pinned)
            if 2 * (here + 1) > self.count or (self.memory is not None and 2 * (size + entry.bytes) > self.memory):
                raise NoRoom(
                    f"pinned adapters of tenants take at most half of the {self.count} slots and of the memory: "
                    "unpin another one"
                )
        entry.pinned = True

    def close(self, entry: Entry) -> None:
        """Free a slot."""
        self._free_slot(entry)
        self.budget.announce_room(self)

    def gives_way(self, before: float) -> bool:
        """Whether another engine of the budget waits for memory since before that time, and longer than this one."""
        return any(each.wait < min(before, self.wait) for each in self.budget.members if each is not self)

    def short_of_memory(self, size: int) -> bool:
        """Whether that many bytes would not be free even if all idle adapters were evicted."""
        kept = sum(each.bytes for each in self.budget.entries() if not each.idle)
        return self.memory is not None and kept + size > self.memory

    def _free_slot(self, entry: Entry) -> None:
        del self._entries[entry.digest]
        self._free.append(entry.slot)
        self.bytes -= entry.bytes

    def _check_possible(self, digest: str, size: int) -> None:
        pinned = [each for each in self._entries.values() if each.pinned]
        taken = sum(each.bytes for each in self.budget.entries() if each.pinned)
        if self.memory is not None and size + taken > self.memory:
            part = f", of which pinned adapters take {taken:,}" if taken else ""
            name = digest.rpartition("/")[2][:19]  # without its tenant
            raise NoRoom(
                f"adapter {name} takes {size:,} bytes and the limit of memory is {self.memory:,}{part}: "
                "raise the limit, or unpin"
            )
        if len(pinned) >= self.count:
            raise NoRoom(f"all {self.count} slots hold pinned adapters: raise the limit of slots, or unpin")

    def _make_room(self, size: int, slots: int) -> list[Entry] | None:
        """Evict idle adapters until `size` bytes and `slots` slots are free; None, with no eviction, if impossible.

        Those of other engines are evicted for their bytes only, and not returned.
        """
        free, spare = len(self._free), math.inf if self.memory is None else self.memory - self.budget.bytes
        evicted: list[Entry] = []
        for entry in sorted((each for each in self.budget.entries() if each.idle), key=lambda each: each.used):
            if free >= slots and spare >= size:
                break
            if entry.owner is self or spare < size:
                evicted.append(entry)
                free += entry.owner is self
                spare += entry.bytes
        if free < slots or spare < size:
            return None
        for entry in evicted:
            entry.owner._free_slot(entry)
            entry.owner.evictions += 1
            if entry.owner is not self:
                entry.owner.on_taken(entry)
        return [entry for entry in evicted if entry.owner is self]

    def _touch(self, entry: Entry) -> None:
        self.budget.uses += 1
        entry.used = self.budget.uses
