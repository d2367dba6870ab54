"""JSON values as Python has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"  # any JSON or TOML
JsonValue: TypeAlias = Any  # what a library gives, on its way to a shape
JsonObject: TypeAlias = dict[str, Any]  # for writing
JsonMapping: TypeAlias = Mapping[str, Any]  # for reading


def mapping_of(value: Plain) -> JsonMapping:
    """The value if it is a mapping, else an empty one: what others wrote may hold anything."""
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class AsJson:
    """A base of dataclasses whose JSON has exactly their fields."""

    def as_json(self) -> JsonObject:
        """The fields by their names."""
        return asdict(self)
