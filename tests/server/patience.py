"""Wait for a condition, with a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(so: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits until a condition holds, and fails after a time limit."""
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
