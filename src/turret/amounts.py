"""Bytes, counts and durations as people read them."""

from __future__ import annotations


def size(count: float | None) -> str:
    """Bytes: `980 B`, `87.0 kB`, `1.2 MB`."""
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def many(count: float) -> str:
    """A count: `980`, `74.0k`, `22.7M`."""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 1000 or unit == "B":
            break
        count /= 1000
    return f"{count:.0f}{unit}" if unit == "" or count >= 100 else f"{count:.1f}{unit}"


def span(seconds: float) -> str:
    """A duration: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
