"""JSON values as Python has them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

# --- timestamp --------------------------------------------------------------------------------------------------------
# Moments as the store keeps them, in ISO 8601 and UTC, and as people read them.


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


# --- json types -------------------------------------------------------------------------------------------------------


JsonValue: TypeAlias = Any  # mypy cannot narrow a recursive type: check a value before using it
JsonObject: TypeAlias = dict[str, Any]  # for writing
JsonMapping: TypeAlias = Mapping[str, Any]  # for reading


def mapping_of(value: JsonValue) -> JsonMapping:
    """The value if it is a mapping, else an empty one: what others wrote may hold anything."""
    return value if isinstance(value, Mapping) else {}


def part(whole: JsonMapping, key: str) -> JsonMapping:
    """A section of a manifest; empty if it is missing or not a mapping."""
    return mapping_of(whole.get(key))
