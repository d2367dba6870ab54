"""Which version an alias means on this server: what the store says, once it is warm. No torch, no HTTP, no clock.

The store may move an alias at any time, from any process. A look at the number of the newest move tells whether one
has. A version that takes the place of one in memory is loaded first and takes over then, so no request waits for a
load; where it cannot be loaded the old one stays in force and the problem is told. An alias whose version is not in
memory moves at once. The followed alias (`production`) is what plain names mean, and is loaded beforehand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turret.errors import BadReference, TurretError
from turret.reference import Reference
from turret.store import Pointing

AGAIN = 30.0  # seconds until a version that could not be loaded is tried again
Key = tuple[str, str]  # name, alias


@dataclass(frozen=True)
class Trouble:
    """A move of the store that is not carried out here."""

    version: str  # the one that cannot take over
    problem: str
    again: float  # when it is tried next


class AliasWatcher:
    """`poll` is called by one thread; everything else by any."""

    def __init__(
        self,
        last_move: Callable[[], int],
        pointing: Callable[[], tuple[int, Sequence[Pointing]]],
        warm: Callable[[str], Any],
        in_memory: Callable[[str], bool],
        *,
        base: str,
        alias: str,
        clock: Callable[[], float],
    ) -> None:
        self._last_move, self._pointing = last_move, pointing
        self._warm, self._in_memory = warm, in_memory
        self._base, self.alias = base, alias  # the base's fingerprint; the alias that plain names mean
        self._clock = clock
        self._seen = -1
        self._wanted: Mapping[Key, Pointing] = {}
        self._ahead: list[str] = []
        self._one = threading.Lock()
        self._in_force: dict[Key, Pointing] = {}
        self.trouble: dict[Key, Trouble] = {}
        self.failures = 0

    @property
    def ready(self) -> bool:
        """Whether a first look was taken and everything ahead of the first request is loaded, or was tried."""
        return self._seen >= 0 and not self._ahead

    def means(self, name: str, alias: str | None) -> int | None:
        """The version in force here; None where the store is to say."""
        found = self._in_force.get((name, alias or self.alias))
        return None if found is None else found.number

    def exact(self, reference: str) -> str:
        """`sentiment@production` -> `sentiment@3` where that is in force here; anything else as it is."""
        try:
            wanted = Reference.parse(reference)
        except BadReference:
            return reference
        number = None if wanted.version is not None else self.means(wanted.name, wanted.alias)
        return reference if number is None else f"{wanted.name}@{number}"

    def spelled(self, reference: str) -> str:
        """`sentiment` -> `sentiment@production` where that is in force here; anything else as it is."""
        return f"{reference}@{self.alias}" if (reference, self.alias) in self._in_force else reference

    def poll(self, seconds: float = 0.5) -> None:
        """One look at the store, and what follows from it; loads ahead for about so many seconds."""
        with self._one:
            if self._last_move() != self._seen or self._due():
                first = self._seen < 0
                self._seen, found = self._pointing()
                self._wanted = {(each.name, each.alias): each for each in found}
                for key in self._in_force.keys() - self._wanted.keys():
                    del self._in_force[key]
                    self.trouble.pop(key, None)
                for key, each in self._wanted.items():
                    if self._version(key) != each.digest:
                        self._take(key, each, first=first)
                    else:
                        self.trouble.pop(key, None)
            self._load_ahead(self._clock() + seconds)

    def _due(self) -> bool:
        now = self._clock()
        return any(each.again <= now for each in self.trouble.values())

    def _version(self, key: Key) -> str | None:
        found = self._in_force.get(key)
        return None if found is None else found.digest

    def _take(self, key: Key, each: Pointing, *, first: bool) -> None:
        old, version = self._in_force.get(key), f"{each.name}@{each.number}"
        if each.base != self._base:
            if old is not None:
                self._keep(key, version, f"{version} was trained on another base than this server's")
            return
        followed = each.alias == self.alias
        if first and followed:
            self._ahead.append(version)
        elif followed or (old is not None and self._in_memory(old.digest)):
            try:
                self._warm(version)
            except TurretError as error:
                if old is not None:
                    self._keep(key, version, str(error))
                    return
                self.failures += 1
        self._in_force[key] = each
        self.trouble.pop(key, None)

    def _keep(self, key: Key, version: str, why: str) -> None:
        self.failures += 1
        self.trouble[key] = Trouble(version, why, self._clock() + AGAIN)

    def _load_ahead(self, until: float) -> None:
        while self._ahead and self._clock() < until:
            try:
                self._warm(self._ahead[0])
            except TurretError:
                self.failures += 1  # whoever asks for it is told
            self._ahead.pop(0)
