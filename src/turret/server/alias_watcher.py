"""Which version each alias means on this server: the one in the store, once it is loaded.

Any process may move an alias in the store at any time. `poll` compares the number of the newest move. If the new
version replaces one in memory, it is loaded first, so that no request waits for a load. If the load fails, the old
version stays in force, and `failed_moves` says why. An alias whose version is not in memory moves at once. Plain names
mean the followed alias (`production`); its versions are loaded in advance.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from turret.engine import Named
from turret.errors import BadReference, TurretError
from turret.reference import Reference
from turret.store import Pointing

RETRY_SECONDS = 30.0  # until a version that could not be loaded is tried again
Key = tuple[str, str]  # name, alias


@dataclass(frozen=True)
class FailedMove:
    """A move in the store that this server could not follow."""

    version: str  # the version that could not be loaded
    problem: str
    retry_at: float


class AliasWatcher:
    """The aliases as this server has them. One thread calls `poll`; any thread may call the rest.

    Args:
        last_move: The number of the newest move in the store.
        pointing: That number, and where every alias in the store points.
        warm: Loads a version.
        in_memory: Whether the version of a digest is loaded.
        bases: The fingerprints of the server's bases.
        alias: What plain names mean.
    """

    def __init__(
        self,
        last_move: Callable[[], int],
        pointing: Callable[[], tuple[int, Sequence[Pointing]]],
        warm: Callable[[str], Named],
        in_memory: Callable[[str], bool],
        *,
        bases: Collection[str],
        alias: str,
        clock: Callable[[], float],
    ) -> None:
        self._last_move, self._pointing = last_move, pointing
        self._warm, self._in_memory = warm, in_memory
        self._bases, self.alias = bases, alias
        self._clock = clock
        self._move = -1  # the newest move that `poll` has seen
        self._stored: Mapping[Key, Pointing] = {}
        self._to_load: list[str] = []
        self._lock = threading.Lock()
        self._in_force: dict[Key, Pointing] = {}
        self.failed_moves: dict[Key, FailedMove] = {}
        self.failures = 0

    @property
    def ready(self) -> bool:
        """Whether the store was read and every version to load in advance was loaded, or failed to load."""
        return self._move >= 0 and not self._to_load

    def version_of(self, name: str, alias: str | None) -> int | None:
        """The version in force; None if this server does not follow the alias."""
        found = self._in_force.get((name, alias or self.alias))
        return None if found is None else found.number

    def exact(self, reference: str) -> str:
        """`sentiment@production` -> `sentiment@3`, if this server follows that alias; else the reference unchanged.

        Each part of a composition is taken on its own.
        """
        if "+" in reference:
            return "+".join(map(self.exact, reference.split("+")))
        try:
            parsed = Reference.parse(reference)
        except BadReference:
            return reference
        number = None if parsed.version is not None else self.version_of(parsed.name, parsed.alias)
        return reference if number is None else f"{parsed.name}@{number}"

    def with_alias(self, reference: str) -> str:
        """`sentiment` -> `sentiment@production`, if this server follows that alias; else the reference unchanged."""
        parts = [
            f"{each}@{self.alias}" if (each, self.alias) in self._in_force else each for each in reference.split("+")
        ]
        return "+".join(parts)

    def poll(self, seconds: float = 0.5, newest: int | None = None) -> None:
        """Follow the store once, and then load versions in advance for about that many seconds.

        newest: The number of the newest move, if it was just read, for example for many tenants.
        """
        with self._lock:
            if (self._last_move() if newest is None else newest) != self._move or self._retry_due():
                move, found = self._pointing()
                failed = self._follow_all(found)
                self._move = move  # at the end: until then this server is not ready
                if failed is not None:
                    raise failed
            self._load_ahead(self._clock() + seconds)

    def _follow_all(self, found: Sequence[Pointing]) -> Exception | None:
        """Follow every alias, also if one of them fails: it is tried again later. Returns the first error."""
        first, failed = self._move < 0, None
        self._stored = {(each.name, each.alias): each for each in found}
        for key in self._in_force.keys() - self._stored.keys():
            del self._in_force[key]
            self.failed_moves.pop(key, None)
        for key, each in self._stored.items():
            if self._digest(key) == each.digest:
                self.failed_moves.pop(key, None)
                continue
            try:
                self._follow(key, each, first=first)
            except Exception as error:  # a bug, or a database that is away
                self._fail(key, f"{each.name}@{each.number}", str(error))
                failed = failed or error
        return failed

    def _retry_due(self) -> bool:
        now = self._clock()
        return any(each.retry_at <= now for each in self.failed_moves.values())

    def _digest(self, key: Key) -> str | None:
        found = self._in_force.get(key)
        return None if found is None else found.digest

    def _follow(self, key: Key, new: Pointing, *, first: bool) -> None:
        old, version = self._in_force.get(key), f"{new.name}@{new.number}"
        if new.base not in self._bases:
            if old is not None:
                self._fail(key, version, f"{version} was trained on another base than this server's")
            return
        followed = new.alias == self.alias
        if first and followed:
            self._to_load.append(version)
        elif followed or (old is not None and self._in_memory(old.digest)):
            try:
                self._warm(version)
            except TurretError as error:
                if old is not None:
                    self._fail(key, version, str(error))
                    return
                self.failures += 1
        self._in_force[key] = new
        self.failed_moves.pop(key, None)

    def _fail(self, key: Key, version: str, problem: str) -> None:
        self.failures += 1
        self.failed_moves[key] = FailedMove(version, problem, self._clock() + RETRY_SECONDS)

    def _load_ahead(self, until: float) -> None:
        while self._to_load and self._clock() < until:
            try:
                self._warm(self._to_load[0])
            except TurretError:
                self.failures += 1  # a request for the version gets the error
            self._to_load.pop(0)
