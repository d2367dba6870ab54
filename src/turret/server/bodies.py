"""Read a JSON body as the model of a route, in bounded time.

Parsing and validation take time by the number of keys and values, not by the number of bytes, and both hold Python's
global lock. So keys and values are counted before a body is parsed, and a large body is then read on a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic_core import from_json

from turret.errors import TooLarge
from turret.json_types import JsonObject, JsonValue
from turret.server.limits import RequestLimits

INLINE = 64 << 10  # bytes; a larger body is read on a thread
Body: TypeAlias = BaseModel | Sequence[BaseModel]  # what a route receives


class Field(Protocol):
    """FastAPI's field of the body of a route."""

    def validate(
        self, value: JsonValue, values: JsonObject, *, loc: tuple[int | str, ...] = ()
    ) -> tuple[Body, list[JsonObject]]: ...


def read(content: bytes, field: Field, limits: RequestLimits) -> Body:
    """The body as the model of its route. Raises TooLarge, HTTPException (not JSON) and RequestValidationError."""
    check_counts(content, limits)
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    body, errors = field.validate(value, {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return body


def check_counts(content: bytes, limits: RequestLimits) -> None:
    """Raises TooLarge. Exact for JSON; for anything else, the parser stops before it reads more than was counted."""
    if _keys(content) <= limits.body_keys and _values(content) <= limits.body_values:
        return  # the counts include the characters in strings, and are within the limits all the same
    outside = _outside_strings(content, limit=1 + limits.body_keys + limits.body_values)
    for name, count, limit in (
        ("keys", _keys(outside), limits.body_keys),
        ("values", _values(outside), limits.body_values),
    ):
        if count > limit:
            raise TooLarge(f"the body has more than {limit} {name}: send the inputs in several requests")


def _keys(text: bytes) -> int:
    return text.count(b":")


def _values(text: bytes) -> int:
    """Every value but the first follows a comma, or is the first one in a list or an object."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _outside_strings(content: bytes, limit: int) -> bytes:
    """The body without its strings. limit: of strings, checked before the body is split at them."""
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 2 * limit:
        raise TooLarge(f"the body has more than {limit} strings: send the inputs in several requests")
    return b"".join(plain.split(b'"')[::2])
