"""TOML as recipes use it: read with limits, and values written on one line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from datetime import date, time
from typing import Any


def loads(text: str) -> dict[str, Any]:
    """Read TOML. Raises ValueError, also for values that TOML has and no setting is."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError("it has a whole number of thousands of digits: a setting has at most 64 bits") from None
    _check_plain(found)
    return found


def _check_plain(value: Any) -> None:
    if isinstance(value, int) and abs(value) >> 63:
        raise ValueError(f"it has a whole number of {value.bit_length()} bits: a setting has at most 64")
    if isinstance(value, (date, time)):
        raise ValueError(f"it has the date or time {value}: put it in quotes where text is meant")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(each)


def value(text: str) -> Any:
    """Read one TOML value on one line. Raises ValueError."""
    if "\n" in text:
        raise ValueError(text)
    return loads(f"value = {text}")["value"]


def value_or_text(text: str) -> Any:
    """Read one TOML value; text that is none stays text."""
    try:
        return value(text)
    except (ValueError, RecursionError):
        return text


def written(value: Any) -> str:
    """A TOML value on one line; tomllib reads it back equal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(str(k))} = {written(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(written(v) for v in value) + "]"
