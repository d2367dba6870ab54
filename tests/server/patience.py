"""Waiting for what comes by itself, and no longer than it may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(so: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits until something is so, and fails where it does not come."""
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
