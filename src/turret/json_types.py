"""JSON values as Python has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

JsonValue: TypeAlias = Any  # mypy cannot narrow a recursive type: check a value before using it
JsonObject: TypeAlias = dict[str, Any]  # for writing
JsonMapping: TypeAlias = Mapping[str, Any]  # for reading
