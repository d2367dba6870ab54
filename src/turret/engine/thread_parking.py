"""How the engine's thread waits: it parks its OpenMP helper threads when idle and wakes them when work arrives.

Idle helpers of one thread slow down the parallel work of other threads (see `turret.kernels.rest`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from turret import kernels

IDLE = 0.05  # seconds without work before the helpers are parked


def wait(condition: threading.Condition, busy: Callable[[], bool], left: Callable[[], float | None]) -> None:
    """Wait until there is work. Call it with the lock of `condition`.

    Args:
        condition: Notified when work arrives, or when an adapter starts to load.
        busy: Whether there is work.
        left: Seconds until there will be work without a notification; None for never.
    """
    parked = False
    while not busy():
        seconds = left()
        notified = condition.wait(seconds if parked else IDLE if seconds is None else min(seconds, IDLE))
        if notified:  # work follows, perhaps after a load
            condition.release()
            try:
                kernels.wake()
            finally:
                condition.acquire()
            parked = False
        elif not parked:
            kernels.rest()
            parked = True
