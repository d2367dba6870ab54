"""The type of a progress callback: it gets one line of text at the start of each stage."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Report nothing."""
