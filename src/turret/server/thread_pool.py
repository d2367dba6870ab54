"""Threads for one kind of blocking work, with a limit on how many calls may wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

from turret.errors import Busy

P = ParamSpec("P")
T = TypeVar("T")


class ThreadPool:
    """`await pool(function, ...)` runs a blocking function on a thread.

    Args:
        name: Of the threads.
        threads: How many functions run at a time.
        limit: How many calls may run or wait; the next one raises Busy.
        busy: What waits, for the text of that error.
        retry_after: Seconds after which a client should try again.
    """

    def __init__(self, name: str, threads: int, limit: int, busy: str, retry_after: float) -> None:
        self._pool = ThreadPoolExecutor(threads, f"turret-{name}")
        self._limit, self._busy, self._retry_after = limit, busy, retry_after
        self._calls = 0

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._calls >= self._limit:
            raise Busy(f"{self._calls} {self._busy}: try again", retry_after=self._retry_after)
        self._calls += 1
        try:
            context = copy_context()  # `acting` names the caller on the thread too
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: context.run(function, *args, **kwargs))
        finally:
            self._calls -= 1

    def close(self) -> None:
        """Stop the threads. Calls that wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
