"""Which adapter sits in which slot: least recently used goes first, pins stay, the bytes never pass a bound.

Policy alone, over digests and numbers. Refuses to know what a slot holds, who loads it, threads and clocks.

An adapter is loading or ready. Room for it is made before it is loaded, by its size on the disk, and counted again by
its true size when it is there. What a request holds, or a pin, is never put out.
"""

from __future__ import annotations

from dataclasses import dataclass

from turret.errors import NoRoom


@dataclass
class Entry:
    """One adapter in a slot."""

    digest: str
    slot: int
    bytes: int
    ready: bool = False
    holds: int = 0  # requests that need it
    pinned: bool = False
    used: int = 0  # when it was last used, by a count that only grows

    @property
    def idle(self) -> bool:
        return self.ready and not self.holds and not self.pinned


class Slots:
    """`count` slots, numbered from 1, and at most `memory` bytes in them."""

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
        return self._entries.get(digest)

    def hold(self, entry: Entry) -> None:
        """A request needs it: it stays until `release`."""
        entry.holds += 1
        self._touch(entry)

    def release(self, entry: Entry) -> None:
        assert entry.holds > 0
        entry.holds -= 1
        self._touch(entry)

    def open(self, digest: str, size: int) -> tuple[Entry | None, list[Entry]]:
        """(a new entry that is loading, those put out for it); None while what is held leaves no room.

        Raises NoRoom where there could never be any: the adapter is larger than the bound, or than what pins leave.
        """
        assert digest not in self._entries
        self._possible(digest, size)
        evicted = self._make_room(size, slots=1)
        if evicted is None:
            return None, []
        entry = self._entries[digest] = Entry(digest, self._free.pop(), size)
        self.bytes += size
        self._touch(entry)
        return entry, evicted

    def filled(self, entry: Entry, size: int) -> list[Entry] | None:
        """It is loaded and has this size; those put out for what it has more than was thought.

        None, and it is out again, where that much room cannot be made now.
        """
        assert not entry.ready
        try:
            self._possible(entry.digest, size - entry.bytes)
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
        """It leaves its slot: it could not be loaded, or is not wanted any more."""
        del self._entries[entry.digest]
        self._free.append(entry.slot)
        self.bytes -= entry.bytes

    def _possible(self, digest: str, size: int) -> None:
        pinned = [each for each in self._entries.values() if each.pinned]
        held = sum(each.bytes for each in pinned)
        if self.memory is not None and size + held > self.memory:
            said = f", of which pinned adapters take {held:,}" if held else ""
            raise NoRoom(
                f"adapter {digest[:19]} takes {size:,} bytes and the limit of memory is {self.memory:,}{said}: "
                "raise the limit, or unpin"
            )
        if len(pinned) >= self.count:
            raise NoRoom(f"all {self.count} slots hold pinned adapters: raise the limit of slots, or unpin")

    def _make_room(self, size: int, slots: int) -> list[Entry] | None:
        """Put idle adapters out, least recently used first, until it fits; None, and none is out, if it cannot."""
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
