"""How the engine's thread waits: awake for a moment, and then without the helper threads that others would wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable

from turret.kernels import rest

IDLE = 0.05  # seconds without work, after which the helpers of a pass are let go


def wait(wake: threading.Condition, busy: Callable[[], bool], left: Callable[[], float | None]) -> None:
    """With the lock: until there is something to do. left: seconds until there will be, None for never."""
    resting = False
    while not busy():
        seconds = left()
        woken = wake.wait(seconds if resting else IDLE if seconds is None else min(seconds, IDLE))
        if not woken and not resting:
            rest()
            resting = True
