"""Ctrl-C and SIGTERM as a request to stop: the first signal lets the current step finish, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], None] | int | None  # as `signal.signal` returns it


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM in the block sets `asked`, the second raises KeyboardInterrupt.

    Python allows signal handlers only in the main thread. In other threads the block installs none.
    """

    def __init__(self) -> None:
        self.asked = False
        self.number = 0  # of the first signal
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for each, previous in self._previous.items():
                signal.signal(each, signal.SIG_DFL if previous is None else previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.number = True, number


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay the first SIGINT or SIGTERM until the end of the block. A second signal stops at once."""
    stop = StopRequest()
    try:
        with stop:
            yield
    finally:
        if stop.asked:
            signal.raise_signal(stop.number)
