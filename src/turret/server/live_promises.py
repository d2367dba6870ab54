"""Which answers of a version abstain, and a log of the answers that a promise covers.

The promises of a tenant are read when one has changed. A version that was never asked for is looked up before its first
answer is sent, so no answer slips past a promise while a new version follows an alias. A killed process loses the log
of its last second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from turret.audit import Mark
from turret.database import Database
from turret.store import promise_inputs, promises
from turret.store.promises import LONGEST_RECEIPT, LoggedAnswer, Promise
from turret.tasks import Task
from turret.tasks.shapes import Answer
from turret.timestamp import timestamp

MOST_KEPT = 100_000  # unwritten answers, while the store cannot be reached
MOST_KNOWN = 10_000  # versions


@dataclass(frozen=True)
class Covered:
    """A version's promise, and the task that its answers are of."""

    promise: Promise
    task: type[Task]
    watched: bool  # live texts are compared with its examples


class LivePromises:
    """The promises of one tenant. `turn` has a thread of its own; any thread calls the rest.

    Args:
        mark: Returns what differs after a change of a promise; without it they are read at every turn.
    """

    def __init__(
        self, database: Database, mark: Callable[[], Mark] | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._database, self._mark, self._clock = database, mark, clock
        self._read_mark: Mark | None = None  # of the last read
        self._known: dict[str, Covered | None] = {}  # by the digest of a version
        self._unwritten: list[LoggedAnswer] = []
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self.lost = 0  # answers that were not logged

    @property
    def has_any(self) -> bool:
        """Whether the tenant had a promise at the last read."""
        return any(each is not None for each in self._known.values())

    def knows(self, digest: str) -> bool:
        """Whether `of` reads nothing."""
        return digest in self._known

    def of(self, digest: str) -> Covered | None:
        """The promise of a version; None without one. Reads the store for a version that is not known yet."""
        if digest not in self._known:
            with self._database.reading() as connection:
                found = promises.of_digest(connection, digest)
                self._known[digest] = None if found is None else _covered(connection, found)
        return self._known[digest]

    def answered(self, covered: Covered, receipt: str, answers: Sequence[Answer]) -> list[bool]:
        """Whether each answer abstains; logs all of them.

        Args:
            receipt: the id of the request; each of several answers has `RECEIPT#0`, `RECEIPT#1` and so on.
        """
        promise, at = covered.promise, timestamp(self._clock())
        found, logged = [], list[LoggedAnswer]()
        for place, answer in enumerate(answers):
            abstains = promise.abstains(covered.task, answer)
            found.append(abstains)
            if (decision := covered.task.decision(answer)) is not None:
                own = (receipt if len(answers) == 1 else f"{receipt}#{place}")[:LONGEST_RECEIPT]
                logged.append(LoggedAnswer(promise.id, own, *decision, int(not abstains), at))
        with self._lock:
            room = max(MOST_KEPT - len(self._unwritten), 0)
            self._unwritten += logged[:room]
            self.lost += len(logged) - min(room, len(logged))
        return found

    def turn(self) -> None:
        """Write the log, and read the promises in force if one may have changed. Raises StoreError."""
        self.flush()
        mark = self._mark() if self._mark else None
        if mark is not None and mark == self._read_mark:
            return
        with self._database.reading() as connection:
            new = {each.digest: _covered(connection, each) for each in promises.in_force(connection)}
        known = list(self._known) if len(self._known) < MOST_KNOWN else []
        self._known = {**{digest: new.get(digest) for digest in known}, **new}
        self._read_mark = mark

    def flush(self) -> None:
        """Write the log now. If that fails, the log is kept. Raises StoreError."""
        with self._writing:
            with self._lock:
                logged, self._unwritten = self._unwritten, []
            if not logged:
                return
            try:
                with self._database.writing() as connection:
                    promises.log(connection, logged)
            except BaseException:
                with self._lock:
                    self._unwritten = [*logged, *self._unwritten]
                raise


def _covered(connection: Connection, promise: Promise) -> Covered:
    watch = promise_inputs.watch_of(connection, promise.id)
    return Covered(promise, promises.task_of(connection, promise), watch is not None and watch.drifted is None)
