"""JSON values as Python has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

JsonValue: TypeAlias = Any  # mypy cannot narrow a recursive type: check a value before using it
JsonObject: TypeAlias = dict[str, Any]  # for writing
JsonMapping: TypeAlias = Mapping[str, Any]  # for reading
Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"  # JSON or TOML


def mapping_of(value: Plain) -> JsonMapping:
    """The value if it is a mapping, else an empty one: what others wrote may hold anything."""
    return value if isinstance(value, Mapping) else {}
