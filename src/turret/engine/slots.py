"""Which adapter is in which slot: the least recently used is evicted first, within a limit of bytes.

An adapter is loading or ready. Memory is reserved before it is loaded, by its size on disk, and counted again by its
true size afterwards. Adapters that a request holds, or that are pinned, are never evicted.
"""

from __future__ import annotations

from dataclasses import dataclass

from turret.errors import NoRoom


@dataclass
class Entry:
    """A slot with an adapter in it."""

    digest: str  # with its tenant: `Named.key`
    slot: int
    bytes: int
    ready: bool = False
    holds: int = 0  # requests that need it
    pinned: bool = False
    used: int = 0  # the count of uses at its last use

    @property
    def idle(self) -> bool:
        """Whether it may be evicted."""
        return self.ready and not self.holds and not self.pinned


class Slots:
    """`count` slots, numbered from 1, with at most `memory` bytes in them; None for no limit."""

    def __init__(self, count: int, memory: int | None) -> None:
        self.count, self.memory = count, memory
        self.bytes = 0
        self.evictions = 0
        self._entries: dict[str, Entry] = {}
        self._free = list(range(count, 0, -1))
        self._tick = 0

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

    def open(self, digest: str, size: int) -> tuple[Entry | None, list[Entry]]:
        """Take a slot for an adapter that will be loaded.

        Args:
            digest: Of the adapter.
            size: Its bytes on disk.

        Returns:
            The slot and those evicted for it; (None, []) while adapters in use leave too little memory.

        Raises:
            NoRoom: The adapter is larger than the limit, or than what pinned adapters leave of it.
        """
        assert digest not in self._entries
        self._check_possible(digest, size)
        evicted = self._make_room(size, slots=1)
        if evicted is None:
            return None, []
        entry = self._entries[digest] = Entry(digest, self._free.pop(), size)
        self.bytes += size
        self._touch(entry)
        return entry, evicted

    def filled(self, entry: Entry, size: int) -> list[Entry] | None:
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
        return evicted

    def close(self, entry: Entry) -> None:
        """Free a slot."""
        del self._entries[entry.digest]
        self._free.append(entry.slot)
        self.bytes -= entry.bytes

    def _check_possible(self, digest: str, size: int) -> None:
        pinned = [each for each in self._entries.values() if each.pinned]
        taken = sum(each.bytes for each in pinned)
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
        """Evict idle adapters until `size` bytes and `slots` slots are free; None, with no eviction, if impossible."""
        free, spare = len(self._free), None if self.memory is None else self.memory - self.bytes
        evicted: list[Entry] = []
        for entry in sorted((each for each in self._entries.values() if each.idle), key=lambda each: each.used):
            if free >= slots and (spare is None or spare >= size):
                break
            evicted.append(entry)
            free += 1
            spare = None if spare is None else spare + entry.bytes
        if free < slots or (spare is not None and spare < size):
            return None
        for entry in evicted:
            self.close(entry)
            self.evictions += 1
        return evicted

    def _touch(self, entry: Entry) -> None:
        self._tick += 1
        entry.used = self._tick
