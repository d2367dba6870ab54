"""What tenants share: whose turn it is, and who still gets a place when one of them has taken all.

`Turns` counts what each tenant was given and lets the one with the least go next: the virtual token counter of Sheng et
al., "Fairness in Serving Large Language Models" (OSDI 2024). A tenant that had no work starts at the lowest count of
those that have some, so nobody saves up turns. With one tenant the order is the order of arrival.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

from turret.errors import Busy

T = TypeVar("T")
SPARE = 8  # one place in so many is added for tenants that hold few
GUESTS = 4  # tenants that find one of these at the same time


class Turns:
    """Counts what each tenant with work was given: tokens, or seconds."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._work: Counter[str] = Counter()  # pieces of work that wait or run

    def join(self, tenant: str) -> None:
        """Count one more piece of work of a tenant."""
        if not self._work:
            self._served.clear()
        if tenant not in self._work:
            least = min((self._served[each] for each in self._work), default=0)
            self._served[tenant] = max(self._served.get(tenant, 0), least)
        self._work[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Count one piece of work less."""
        self._work[tenant] -= 1
        if not self._work[tenant]:
            del self._work[tenant]

    def charge(self, tenant: str, amount: float) -> None:
        """Count what a tenant was given."""
        self._served[tenant] = self._served.get(tenant, 0) + amount

    def served_cost(self, tenant: str) -> float:
        """What a tenant was given."""
        return self._served.get(tenant, 0)


class Places:
    """A limit that tenants share.

    Anybody may take places up to the limit. Once they are taken, a tenant that holds few gets one of some spare places,
    so a tenant alone has the whole limit and still keeps nobody out.

    Args:
        most: The limit.
        guests: Tenants that find a spare place at the same time; 0 for no spare places.
    """

    def __init__(self, most: int, guests: int = GUESTS) -> None:
        self.most, self.taken = most, 0
        self.of: Counter[str] = Counter()  # by tenant
        self._spare = max(1, most // SPARE) if guests and most else 0  # a limit of 0 stays 0
        self._each = max(1, self._spare // guests) if guests else 0

    @property
    def all(self) -> int:
        """The limit and the spare places."""
        return self.most + self._spare

    def has_room(self, tenant: str, amount: int = 1) -> bool:
        """Whether a tenant may take so many places now."""
        if self.taken + amount <= self.most:
            return True
        return self.of[tenant] + amount <= self._each and self.taken + amount <= self.all

    def take(self, tenant: str, amount: int = 1) -> None:
        """Count places that a tenant takes."""
        self.taken += amount
        self.of[tenant] += amount

    def free(self, tenant: str, amount: int = 1) -> None:
        """Count places that a tenant gives back."""
        self.taken -= amount
        self.of[tenant] -= amount
        if not self.of[tenant]:
            del self.of[tenant]


class TurnQueue(Generic[T]):
    """Pieces of work that wait for one of a few places. The tenant that holds the fewest, and was given least, goes
    next; the work of one tenant keeps its order. Not thread-safe: the caller has a lock.

    Args:
        places: In which work runs.
    """

    def __init__(self, places: Places) -> None:
        self._places, self._turns = places, Turns()
        self._queues: dict[str, deque[T]] = {}

    def put(self, tenant: str, work: T) -> None:
        """Add a piece of work."""
        self._turns.join(tenant)
        self._queues.setdefault(tenant, deque()).append(work)

    @property
    def waiting(self) -> bool:
        """Whether a piece of work waits."""
        return bool(self._queues)

    def take(self) -> tuple[str, T] | None:
        """The piece of work that begins now, with its tenant; None if no place is free, or nothing waits."""
        may_begin = [each for each in self._queues if self._places.has_room(each)]
        if not may_begin:
            return None
        tenant = min(may_begin, key=lambda each: (self._places.of[each], self._turns.served_cost(each)))
        work = self._queues[tenant].popleft()
        if not self._queues[tenant]:
            del self._queues[tenant]
        self._places.take(tenant)
        return tenant, work

    def end_turn(self, tenant: str, cost: float) -> None:
        """Give the place of a piece of work back. cost: what it took, such as seconds."""
        self._places.free(tenant)
        self._turns.charge(tenant, cost)
        self._turns.leave(tenant)

    def clear(self) -> list[T]:
        """Take all work that waits."""
        left = [(tenant, work) for tenant, queue in self._queues.items() for work in queue]
        self._queues.clear()
        for tenant, _ in left:
            self._turns.leave(tenant)
        return [work for _, work in left]


# --- threads ----------------------------------------------------------------------------------------------------------
# Threads for one kind of blocking work, with a limit on how many calls may wait.


P = ParamSpec("P")


class ThreadPool:
    """`await pool(function, ...)` runs a blocking function on a thread.

    Tenants take turns, by the seconds that their calls took. One that holds all threads, or has the most calls
    waiting, leaves a thread and room for others (`Places`).

    Args:
        name: Of the threads.
        threads: How many functions of one tenant run at a time.
        limit: How many calls may run or wait; the next one raises Busy.
        busy: What waits, for the text of that error.
        retry_after: Seconds after which a client should try again.
    """

    def __init__(self, name: str, threads: int, limit: int, busy: str, retry_after: float) -> None:
        running = Places(threads)
        self._pool = ThreadPoolExecutor(running.all, f"turret-{name}")
        self._busy, self._retry_after = busy, retry_after
        self._lock = threading.Lock()
        self._calls = Places(limit)
        self._waiting = TurnQueue[tuple[Callable[[], None], Callable[[], bool]]](running)  # runs, and drops, a call

    def of(self, tenant: str) -> TenantThreads:
        """The same threads, for the calls of a tenant."""
        return TenantThreads(self, tenant)

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run("", function, *args, **kwargs)

    async def run(self, tenant: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function for a tenant."""
        context = copy_context()  # `acting` names the caller on the thread too
        done: Future[T] = Future()

        def call() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = context.run(function, *args, **kwargs)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)

        with self._lock:
            if not self._calls.has_room(tenant):
                raise Busy(f"too many {self._busy}: try again", retry_after=self._retry_after)
            self._calls.take(tenant)
            self._waiting.put(tenant, (call, done.cancel))
        try:
            self._pool.submit(self._run_calls)
            return await asyncio.wrap_future(done)
        finally:
            with self._lock:
                self._calls.free(tenant)

    def _run_calls(self) -> None:
        """Run the calls whose turn it is, until no more may begin."""
        while True:
            with self._lock:
                found = self._waiting.take()
            if found is None:
                return
            tenant, (run, _) = found
            began = time.monotonic()
            run()
            with self._lock:
                self._waiting.end_turn(tenant, time.monotonic() - began)

    def close(self) -> None:
        """Stop the threads. Calls that wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            left = self._waiting.clear()
        for _, drop in left:
            drop()


@dataclass(frozen=True)
class TenantThreads:
    """The threads of a pool, for the calls of one tenant: `await threads(function, ...)`."""

    pool: ThreadPool
    tenant: str

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.pool.run(self.tenant, function, *args, **kwargs)
