"""JSON values as Python has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

JsonValue: TypeAlias = Any  # mypy cannot narrow a recursive type: check a value before using it
JsonObject: TypeAlias = dict[str, Any]  # for writing
JsonMapping: TypeAlias = Mapping[str, Any]  # for reading


def mapping_of(value: JsonValue) -> JsonMapping:
    """The value if it is a mapping, else an empty one: what others wrote may hold anything."""
    return value if isinstance(value, Mapping) else {}


def part(whole: JsonMapping, key: str) -> JsonMapping:
    """A section of a manifest; empty if it is missing or not a mapping."""
    return mapping_of(whole.get(key))
