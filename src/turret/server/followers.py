"""Threads that follow the store, one for each part of a server, so that a slow part delays no other."""

from __future__ import annotations

import threading
from collections.abc import Callable

from turret.server.logs import Log


class Followers:
    """The threads of one server.

    Args:
        log: Gets one line when a part has lost the store, and one when it is back.
        failed: Called at each try that fails.
    """

    def __init__(self, log: Log, failed: Callable[[], None]) -> None:
        self._log, self._failed = log, failed
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.failing: set[str] = set()  # names of the parts that could not reach the store

    def start(self, name: str, follow: Callable[[], None], seconds: float) -> None:
        """Call `follow` again and again, with so many seconds in between, on a thread with this name."""
        thread = threading.Thread(target=self._repeat, args=[name, follow, seconds], name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """End all threads."""
        self._stopping.set()
        for each in self._threads:
            each.join(timeout=5)

    def _repeat(self, part: str, follow: Callable[[], None], seconds: float) -> None:
        while not self._stopping.is_set():
            try:
                follow()
            except Exception as error:  # the store may be back at the next try
                self._failed()
                if part not in self.failing:
                    problem = {"error": type(error).__name__, "message": str(error)}
                    self._log.write("follow", "error", part=part, following=False, **problem)
                    self.failing.add(part)
            else:
                if part in self.failing:
                    self._log.write("follow", part=part, following=True)
                    self.failing.discard(part)
            self._stopping.wait(seconds)
