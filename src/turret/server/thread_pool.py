"""A few threads for one kind of work, and an end to those that wait for them. Refuses to know what the work is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from turret.errors import Busy

T = TypeVar("T")


class ThreadPool:
    """`await lane(verb, ...)` carries out a blocking verb; with `most` at work or waiting, the next is Busy."""

    def __init__(self, name: str, threads: int, most: int, said: str, retry_after: float) -> None:
        self._pool = ThreadPoolExecutor(threads, f"turret-{name}")
        self._most, self._said, self._retry_after = most, said, retry_after
        self._taken = 0

    async def __call__(self, verb: Callable[..., T], *arguments: Any, **settings: Any) -> T:
        if self._taken >= self._most:
            raise Busy(f"{self._taken} {self._said}: try again", retry_after=self._retry_after)
        self._taken += 1
        try:
            here = copy_context()  # who asks is known in the thread too
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: here.run(verb, *arguments, **settings))
        finally:
            self._taken -= 1

    def close(self) -> None:
        """Let the threads go; what has not begun never does."""
        self._pool.shutdown(wait=False, cancel_futures=True)
