"""Threads for one kind of blocking work, in turns between tenants, with a limit on how many calls may wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from copy import copy
from typing import ParamSpec, TypeVar

from turret.errors import Busy
from turret.turns import Places, TurnQueue

P = ParamSpec("P")
T = TypeVar("T")


class ThreadPool:
    """`await pool(function, ...)` runs a blocking function on a thread.

    Tenants take turns, by the seconds that their calls took. One that holds all threads, or has the most calls
    waiting, leaves a thread and room for others (`turret.turns.Places`).

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
        self._tenant = ""

    def of(self, tenant: str) -> ThreadPool:
        """The same threads, for the calls of a tenant."""
        view = copy(self)
        view._tenant = tenant
        return view

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        tenant, context = self._tenant, copy_context()  # `acting` names the caller on the thread too
        done: Future[T] = Future()

        def run() -> None:
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
            self._waiting.put(tenant, (run, done.cancel))
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
                self._waiting.ended(tenant, time.monotonic() - began)

    def close(self) -> None:
        """Stop the threads. Calls that wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            left = self._waiting.clear()
        for _, drop in left:
            drop()
