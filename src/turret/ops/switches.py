"""Which of the faster paths are off in this thread; `table.without` turns them off by name."""

from __future__ import annotations

from contextvars import ContextVar

off: ContextVar[frozenset[str]] = ContextVar("fast_paths_off", default=frozenset())


def enabled(name: str) -> bool:
    """Whether a path may be taken: always, except inside `table.without`."""
    return name not in off.get()
