"""The type of a progress callback: it gets one line of text at the start of each stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
Say = Callable[[str], None]


def silent(_value: T) -> None:
    """A callback that does nothing."""
