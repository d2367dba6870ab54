"""Wait for a condition, or for an answer, with a time limit."""

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


def patient(client: Any) -> Any:
    """A client that waits until a busy machine has started a helper process."""
    client.timeout = 120
    return client
