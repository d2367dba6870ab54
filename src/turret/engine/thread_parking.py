"""How the engine's thread waits: soon without the helper threads that others' work would wait for, and with them again
when somebody begins something."""

from __future__ import annotations

import threading
from collections.abc import Callable

from turret import kernels

IDLE = 0.05  # seconds without work, after which the helpers of a pass are let go


def wait(condition: threading.Condition, busy: Callable[[], bool], left: Callable[[], float | None]) -> None:
    """With the lock: until there is something to do. left: seconds until there will be, None for never."""
    resting = False
    while not busy():
        seconds = left()
        told = condition.wait(seconds if resting else IDLE if seconds is None else min(seconds, IDLE))
        if told:  # work, or a load that work will follow
            condition.release()
            try:
                kernels.wake()
            finally:
                condition.acquire()
            resting = False
        elif not resting:
            kernels.rest()
            resting = True
