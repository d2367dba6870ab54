"""Ctrl-C or SIGTERM as a request: the first finishes the step, the second stops at once. Knows signals and threads."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """`with StopRequest() as stop:` turns the first SIGINT or SIGTERM into `stop.asked`. Handlers belong to the main
    thread; in any other nothing is installed and the signals mean what they meant before."""

    def __init__(self) -> None:
        self.asked = False
        self.number = 0  # of the signal that asked
        self._previous: dict[signal.Signals, Any] = {}

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
    """The first SIGINT or SIGTERM takes effect after the block; a second one stops at once."""
    stop = StopRequest()
    try:
        with stop:
            yield
    finally:
        if stop.asked:
            signal.raise_signal(stop.number)
