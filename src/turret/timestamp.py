"""Moments as the store keeps them, in ISO 8601 and UTC, and as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def timestamp(moment: datetime | float, timespec: str = "milliseconds") -> str:
    """`2026-11-25T10:13:07.512Z`.

    Args:
        moment: in UTC, or seconds since 1970.
        timespec: the smallest unit, as for `datetime.isoformat`.
    """
    exact = moment if isinstance(moment, datetime) else datetime.fromtimestamp(moment, UTC)
    return exact.isoformat(timespec=timespec).replace("+00:00", "Z")


def to_minute(stored: str) -> str:
    """`2026-11-25T10:13:07.512Z` -> `2026-11-25 10:13 UTC`."""
    return f"{stored[:16].replace('T', ' ')} UTC"
