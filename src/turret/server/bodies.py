"""A JSON body becomes what a route takes, in bounded time: keys and values are counted before anything is parsed.

Parsing and validating cost time by the number of keys and values, not by the number of bytes, and both hold Python's
global lock while they run. So the counts are bounded first, and a large body is then read in a thread.
"""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic_core import from_json

from turret.errors import TooLarge
from turret.server.limits import RequestLimits

INLINE = 64 << 10  # bytes; a larger body is read in a thread


class Field(Protocol):
    """What FastAPI knows of a route's body."""

    def validate(
        self, value: Any, values: dict[str, Any], *, loc: tuple[int | str, ...] = ()
    ) -> tuple[Any, list[dict[str, Any]]]: ...


def read(content: bytes, field: Field, limits: RequestLimits) -> Any:
    """The body as the route's model. Raises TooLarge, HTTPException (not JSON) and RequestValidationError."""
    check_counts(content, limits)
    try:
        given = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    value, errors = field.validate(given, {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return value


def check_counts(content: bytes, limits: RequestLimits) -> None:
    """Raises TooLarge. Exact for JSON; of what is not JSON the parser reads no more than was counted."""
    if _keys(content) <= limits.body_keys and _values(content) <= limits.body_values:
        return  # what stands within strings was counted too, and it is few all the same
    outside = _outside_strings(content, most=1 + limits.body_keys + limits.body_values)
    for name, count, most in (
        ("keys", _keys(outside), limits.body_keys),
        ("values", _values(outside), limits.body_values),
    ):
        if count > most:
            raise TooLarge(f"the body has more than {most} {name}: send the inputs in several requests")


def _keys(text: bytes) -> int:
    return text.count(b":")


def _values(text: bytes) -> int:
    """Each but the first value stands behind a comma or is the first of a list or an object."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _outside_strings(content: bytes, most: int) -> bytes:
    """The body without its strings. most: of strings, before they are taken apart."""
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 2 * most:
        raise TooLarge(f"the body has more than {most} strings: send the inputs in several requests")
    return b"".join(plain.split(b'"')[::2])
