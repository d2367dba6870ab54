"""TOML for recipes: read with limits, and write values on one line.

`tomllib` takes quadratic time for a key with many dots, and for many tables below one another. So size and depth are
checked before it reads a text.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from datetime import date, time

from turret.json_types import JsonObject, Plain

MOST_CHARACTERS = 100_000
MOST_KEYS = 1000  # of all tables, and table headers
MOST_PARTS = 8  # of one key: train.lr has two
MOST_DEPTH = 16  # of brackets

# Strings and comments, in which dots and brackets mean nothing. A string that nobody closes goes to the end: no
# alternative fails after it has read a part of the text, so no part is read twice.
_QUOTED = re.compile(
    r'''"""(?:[^"\\]|\\.|"{1,2}(?!"))*+(?:"{3,5})?|'{3}(?:[^']|'{1,2}(?!'))*+(?:'{3,5})?'''
    r"""|"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?|\#[^\n]*+""",
    re.DOTALL,
)
_KEY = re.compile(r"[^\s=\[\]{},.]++(?:[ \t]*+\.[ \t]*+[^\s=\[\]{},.]++)*+")
_BRACKETS = re.compile(r"[\[\]{}]")


def check_shape(text: str) -> None:
    """Raise ValueError for a text that is larger or nested deeper than any recipe. Takes time by the characters."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters: a recipe has at most {MOST_CHARACTERS}")
    plain = _QUOTED.sub(lambda found: " " if found[0].startswith("#") else "_", text)
    keys = plain.count("=") + plain.count("\n[")
    if keys > MOST_KEYS:
        raise ValueError(f"it has {keys} keys and tables: a recipe has at most {MOST_KEYS}")
    parts = max((found[0].count(".") + 1 for found in _KEY.finditer(plain)), default=0)
    if parts > MOST_PARTS:
        raise ValueError(f"a key has {parts} parts: expected at most {MOST_PARTS}, such as train.lr")
    depth = deepest = 0
    for found in _BRACKETS.finditer(plain):
        depth = depth + 1 if found[0] in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    if deepest > MOST_DEPTH:
        raise ValueError(f"its lists or tables are nested {deepest} deep: expected at most {MOST_DEPTH}")


def loads(text: str) -> JsonObject:
    """Read a TOML document. Raises ValueError; also for dates, integers of more than 64 bits, and by `check_shape`."""
    check_shape(text)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # CPython limits the digits of an integer
        raise ValueError("it has a whole number of thousands of digits: a setting has at most 64 bits") from None
    _check_plain(document)
    return document


def _check_plain(value: Plain | date | time) -> None:
    if isinstance(value, int) and abs(value) >> 63:
        raise ValueError(f"it has a whole number of {value.bit_length()} bits: a setting has at most 64")
    if isinstance(value, (date, time)):
        raise ValueError(f"it has the date or time {value}: put it in quotes to make it text")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(each)


def value(text: str) -> Plain:
    """Read one TOML value on one line. Raises ValueError."""
    if "\n" in text:
        raise ValueError(text)
    found: Plain = loads(f"value = {text}")["value"]
    return found


def value_or_text(text: str) -> Plain:
    """Read one TOML value. Text that is not TOML is returned as it is."""
    try:
        return value(text)
    except (ValueError, RecursionError):
        return text


def written(value: Plain) -> str:
    """Write a value as TOML on one line; `tomllib` reads it back equal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(str(k))} = {written(v)}" for k, v in value.items()) + "}"
    assert value is not None  # TOML has no null
    return "[" + ", ".join(written(v) for v in value) + "]"
