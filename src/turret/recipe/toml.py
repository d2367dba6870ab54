"""TOML for recipes: read with limits, and write values on one line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from datetime import date, time

from turret.json_types import JsonObject, JsonValue


def loads(text: str) -> JsonObject:
    """Read a TOML document. Raises ValueError; also for dates and for integers of more than 64 bits."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # CPython limits the digits of an integer
        raise ValueError("it has a whole number of thousands of digits: a setting has at most 64 bits") from None
    _check_plain(document)
    return document


def _check_plain(value: JsonValue) -> None:
    if isinstance(value, int) and abs(value) >> 63:
        raise ValueError(f"it has a whole number of {value.bit_length()} bits: a setting has at most 64")
    if isinstance(value, (date, time)):
        raise ValueError(f"it has the date or time {value}: put it in quotes to make it text")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(each)


def value(text: str) -> JsonValue:
    """Read one TOML value on one line. Raises ValueError."""
    if "\n" in text:
        raise ValueError(text)
    return loads(f"value = {text}")["value"]


def value_or_text(text: str) -> JsonValue:
    """Read one TOML value. Text that is not TOML is returned as it is."""
    try:
        return value(text)
    except (ValueError, RecursionError):
        return text


def written(value: JsonValue) -> str:
    """Write a value as TOML on one line; `tomllib` reads it back equal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(str(k))} = {written(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(written(v) for v in value) + "]"
