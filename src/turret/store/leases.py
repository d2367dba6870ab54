"""Leases: which process may do a piece of work, among the processes of all machines.

A lease has a name, an owner, an end, and a fence: a number that grows with every new owner.

- The owner renews its lease three times before it ends. `until` is by the catalog's clock, so machines need not agree.
- If the owner is dead, the lease ends and another process takes it. If both are on one machine, it does so at once.
- A process that was stopped for too long may wake up after that. Each of its writes checks owner and fence in the same
  transaction (`Lease.require`), so it writes nothing any more.
- Whoever ends the work raises the fence in the same transaction (`close`). So it ends once, whoever held the lease.
- An owner whose lease has ended keeps it as long as nobody has taken it: after an outage of the catalog all go on.
- A lease that nobody renews for its `seconds`, by the clock of a process that watches it, has ended too: a catalog's
  clock that is set back keeps nothing.

`TURRET_LEASE_SECONDS` changes the length of the leases that a process takes.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from sqlalchemy import Connection, Row, insert, select, update

from turret.database import Database, leases
from turret.errors import LeaseLost, StoreError, TurretError

SECONDS = 30.0
VARIABLE = "TURRET_LEASE_SECONDS"
POLL_SECONDS = 0.25  # while waiting for a lease
TURN_SECONDS = 0.5  # between two turns of a keeper
_given_up: set[str] = set()  # owners of leases of this process
_seen: dict[str, tuple[str, float, float]] = {}  # lease -> its owner, its end, and when this process first saw that


@dataclass(frozen=True)
class Lease:
    """A lease that this process, or its parent process, has taken."""

    name: str
    owner: str  # no two takings have the same
    fence: int
    seconds: float

    def require(self, connection: Connection) -> None:
        """Raise LeaseLost if another process has taken it, in the transaction of the write that needs it."""
        self.require_owner(connection)
        query = select(leases.c.fence).where(leases.c.name == self.name)
        if connection.execute(query).scalar() != self.fence:
            raise LeaseLost(f"{self.name} has ended: nothing that this process does after that is kept")

    def require_owner(self, connection: Connection) -> None:
        """Raise LeaseLost unless this is the last taking of the lease; its own process may have closed it."""
        query = select(leases.c.owner, leases.c.host).where(leases.c.name == self.name)
        row = connection.execute(query).first()
        if row is None or row.owner != self.owner:
            by = "another process" if row is None else f"a process on {row.host}"
            how = f"taken over by {by}" if row is None or row.owner else "ended by another process"
            raise LeaseLost(
                f"{self.name} was {how}, because this process was silent for {self.seconds:g} seconds: "
                "nothing that it did since then is kept"
            )


def lease_seconds() -> float:
    """Seconds of the leases that this process takes."""
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else SECONDS
    except ValueError:
        seconds = 0.0
    if not 0.5 <= seconds <= 3600:
        raise StoreError(f"{VARIABLE}={text[:40]!r}: expected seconds from 0.5 to 3600")
    return seconds


def clock(connection: Connection) -> float:
    """Seconds since 1970 by the catalog's clock, which all machines share."""
    if connection.dialect.name == "postgresql":
        return float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())
    return float(connection.exec_driver_sql("SELECT (julianday('now') - 2440587.5) * 86400.0").scalar_one())


def take(connection: Connection, name: str) -> Lease | None:
    """Take a lease that nobody holds, or whose owner is dead; None if it is held. In a writing transaction."""
    row = connection.execute(select(leases).where(leases.c.name == name)).first()
    now, seconds = clock(connection), lease_seconds()
    if row is not None and row.until > now and not _is_over(row, now):
        return None
    lease = Lease(name, uuid.uuid4().hex, 1 if row is None else row.fence + 1, seconds)
    place = {"process": _this_process(), "host": socket.gethostname()[:255]}
    values = {"owner": lease.owner, **place, "fence": lease.fence, "until": now + seconds, "seconds": seconds}
    if row is None:
        connection.execute(insert(leases).values(name=name, **values))
    else:
        connection.execute(update(leases).where(leases.c.name == name).values(values))
    return lease


def renew(connection: Connection, lease: Lease) -> None:
    """Move the end of a lease, unless it was released or closed in the meantime. Raises LeaseLost."""
    lease.require_owner(connection)
    until = clock(connection) + lease.seconds
    held = (leases.c.name == lease.name) & (leases.c.fence == lease.fence) & (leases.c.until > 0)
    connection.execute(update(leases).where(held).values(until=until))


def adopt(connection: Connection, lease: Lease) -> None:
    """Make this process the one that is looked for: it does the work of its parent process. Raises LeaseLost."""
    lease.require(connection)
    renew(connection, lease)
    connection.execute(update(leases).where(leases.c.name == lease.name).values(process=_this_process()))


def release(connection: Connection, lease: Lease) -> None:
    """End a lease now, unless another process has taken it. The row stays, so that the fence grows on."""
    ours = (leases.c.name == lease.name) & (leases.c.owner == lease.owner) & (leases.c.fence == lease.fence)
    connection.execute(update(leases).where(ours).values(until=0.0))


def close(connection: Connection, name: str, by: Lease | None = None) -> None:
    """End the work of a lease, in the transaction that records its end: nobody who has held it writes any more.

    Args:
        by: the lease of the process that ends its own work. It may still add to a log (`Lease.require_owner`).
    """
    values = {"fence": leases.c.fence + 1, "until": 0.0, "owner": "" if by is None else by.owner}
    connection.execute(update(leases).where(leases.c.name == name).values(values))


def give_up(lease: Lease) -> None:
    """Let this process take a lease again that it holds and cannot release, because the catalog takes no writes."""
    _given_up.add(lease.owner)


def held_leases(connection: Connection, prefix: str, *, late: bool = False) -> set[str]:
    """The names, after the prefix, of the leases that nobody may take.

    Args:
        late: also those that have ended, if their owner lives on this machine and has not released them.
    """
    named = leases.c.name.startswith(prefix, autoescape=True) & (leases.c.until > 0)
    now = clock(connection)
    rows = connection.execute(select(leases).where(named)).all()
    names = {row.name for row in rows}
    for name in [name for name in list(_seen) if name.startswith(prefix) and name not in names]:
        _seen.pop(name, None)
    living = (row for row in rows if not _is_over(row, now) and (row.until > now or (late and _is_here(row.process))))
    return {row.name.removeprefix(prefix) for row in living}


def was_ours(connection: Connection, name: str) -> bool:
    """Whether this process has given a lease up that nobody has taken since."""
    return connection.execute(select(leases.c.owner).where(leases.c.name == name)).scalar() in _given_up


def is_taken(connection: Connection, name: str) -> bool:
    """Whether a process that may be alive holds the lease."""
    return "" in held_leases(connection, name)


def is_free(database: Database, name: str, say: Callable[[str], None]) -> bool:
    """Whether nobody holds a lease. If its owner may be dead, wait until it renews the lease, or the lease ends.

    Args:
        say: called with a line before the wait.
    """
    first = _until(database, name)
    if first is None:
        return True
    until, host, process = first
    if _is_here(process):
        return False
    say(f"waiting up to {lease_seconds():.0f} s to see whether the process on {host} that has {name} is alive")
    while True:
        time.sleep(POLL_SECONDS)
        now = _until(database, name)
        if now is None:
            return True
        if now != (until, host, process):
            return False


def _until(database: Database, name: str) -> tuple[float, str, str] | None:
    """The end, host and process of a lease; None if nobody holds it."""
    with database.reading() as connection:
        row = connection.execute(select(leases).where(leases.c.name == name)).first()
        if row is None or row.until <= (now := clock(connection)) or _is_over(row, now):
            return None
    return row.until, row.host, row.process


class LeaseRenewer:
    """Renews a lease on a thread of its own, for the duration of a `with` block. It does not release it.

    Args:
        turn: called a few times a second with False, and once at the end with True. An error of it is reported once; an
            error at the end is raised, unless the block failed.
        warn: called with a line if the lease is lost or cannot be renewed, or a turn failed.
    """

    def __init__(
        self,
        database: Database,
        lease: Lease,
        *,
        turn: Callable[[bool], None] | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.lease, self.lost = lease, False
        self._database, self._turn, self._warn = database, turn or (lambda over: None), warn
        self._ended, self._over = threading.Event(), threading.Event()  # no renewal follows; no turn follows
        loops = [self._renew_again] if turn is None else [self._renew_again, self._turn_again]
        # A turn may wait for an object store, and the lease must not end meanwhile.
        self._threads = [threading.Thread(target=each, name=f"turret {lease.name}", daemon=True) for each in loops]
        self._said = ""

    def __enter__(self) -> LeaseRenewer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self.lost:
                self.end_turns()
        except TurretError:
            if kind is None:
                raise
        finally:
            self._over.set()
            self._ended.set()
            for thread in self._threads:
                thread.join()

    def end_turns(self) -> None:
        """Make the last turn now, unless it was made; the lease is still renewed. Raises an error of the turn."""
        if self._over.is_set():
            return
        self._over.set()
        for thread in self._threads[1:]:
            thread.join()
        self._turn(True)

    def require(self) -> None:
        """Raise LeaseLost if a renewal found that the lease is lost."""
        if self.lost:
            with self._database.reading() as connection:
                self.lease.require(connection)

    def _renew_again(self) -> None:
        while not self.lost and not self._ended.wait(self.lease.seconds / 3):
            self._succeeds(self._renew)

    def _turn_again(self) -> None:
        pause = TURN_SECONDS
        while not self.lost and not self._over.wait(pause):
            pause = TURN_SECONDS if self._succeeds(lambda: self._turn(False)) else 10 * TURN_SECONDS

    def _renew(self) -> None:
        with self._database.writing() as connection:
            renew(connection, self.lease)

    def _succeeds(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except LeaseLost as error:
            self.lost = True
            self._warn(str(error))
        except Exception as error:  # an outage: the next try may work
            line = f"{self.lease.name}: {error}"
            if line != self._said:
                self._warn(line)
            self._said = line
        else:
            return True
        return False


# --- processes ------------------------------------------------------------------------------------------------------


def _is_over(row: Row[tuple[str | float, ...]], now: float) -> bool:
    """Whether the owner of a lease is dead, or silent while it lasts, or this process has given it up.

    Args:
        now: by the catalog's clock.
    """
    if row.owner in _given_up or is_dead(row.process):
        return True
    seen, moment = _seen.get(row.name), time.monotonic()
    if seen is None or seen[:2] != (row.owner, row.until):
        seen = _seen[row.name] = (row.owner, row.until, moment)
    return bool(row.until > now and moment - seen[2] > row.seconds)


def is_dead(process: str) -> bool:
    """Whether a process of this machine has ended. False for other machines, whose processes cannot be seen.

    The system says so: there is no process of this number, or it started at another time. `/proc` alone says nothing,
    because it may hide the processes of other users.
    """
    if not _is_here(process):
        return False
    number, start, clock = [*process.split("/")[2:], "", ""][:3]
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):  # it lives, and belongs to another user
        pass
    found = _process_start(number)
    if found is None:
        return False
    return found == "" or (clock == _clock() and found != start)


def _is_here(process: str) -> bool:
    """Whether the process was started on this machine since it booted, where this process can see it."""
    return bool(_machine()) and process.startswith(f"{_machine()}/")


def _this_process() -> str:
    """Machine, namespace, number, start and clock of this process; empty where the system does not tell."""
    number = str(os.getpid())
    start = _process_start(number) if _machine() else None
    return f"{_machine()}/{number}/{start}/{_clock()}" if start else ""


def _process_start(number: str) -> str | None:
    """When a process started, by the clock of this process; "" if it has ended, None if the system does not tell."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]  # ended, and its parent has not asked how


@cache
def _machine() -> str:
    """The boot of this machine and the namespace of its processes; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
        ours = os.readlink("/proc/self") == str(os.getpid())  # otherwise /proc shows another namespace
    except OSError:
        return ""
    return f"{boot}/{space}" if ours else ""


@cache
def _clock() -> str:
    """The namespace of clocks, in which /proc tells when a process started; "-" if the system has none."""
    try:
        return os.readlink("/proc/self/ns/time").strip("time:[]")
    except OSError:
        return "-"
