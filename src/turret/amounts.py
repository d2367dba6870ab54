"""Bytes, counts, shares and durations as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: float | None) -> str:
    """Bytes: `980 B`, `87.0 kB`, `1.2 MB`."""
    return "?" if count is None else _scaled(count, (" B", " kB", " MB", " GB"))


def many(count: float) -> str:
    """A count: `980`, `74.0k`, `22.7M`."""
    return _scaled(count, ("", "k", "M", "B"))


def percentage(share: float) -> str:
    """A share: `91.3%`. One that is not quite all or nothing is `99.9%` or `0.1%`."""
    return f"{min(max(share, 0.001), 0.999) if 0 < share < 1 else share:.1%}"


def _scaled(count: float, units: Sequence[str]) -> str:
    """A number in the unit in which it is rounded to below 1000, or in the last one. Each is 1000 of the one before."""
    power = 0
    while abs(round(count)) >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.{0 if power == 0 or count >= 100 else 1}f}{units[power]}"


def span(seconds: float) -> str:
    """A duration: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
