"""Parse references to stored adapters: `name`, `name@3` or `name@production`.

Grammar, in ASCII only:

- `reference = name [ "@" ( version | alias ) ]`
- `name`: a lowercase letter or digit, then up to 99 of these, `-`, `_` and `.`; no two dots in a row, none at the end
- `version`: 1 to 999999999, without leading zeros
- `alias`: a lowercase letter, then up to 31 lowercase letters, digits, `-` or `_`

A name can therefore be no path, option or NUL byte, and no two names look alike in different alphabets. A name alone
means `@production` if that alias exists, else the newest version that no comparison trained; the store resolves it.

An engine also takes a composition: references joined by `+`, such as `legal@production+formal@2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from turret.errors import BadReference

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
MOST_COMPOSED = 8  # adapters of one composition
ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)


def _quote_text(text: str) -> str:
    """The given text in printable ASCII, short enough for one line."""
    shown = ascii(text)
    return shown if len(shown) <= 48 else f"{shown[:44]}...' ({len(text)} characters)"


def parts_of(reference: str) -> list[str]:
    """The references of a composition: `legal@3+formal` -> `legal@3`, `formal`. One reference is a list of one.

    Raises:
        BadReference: There are more than `MOST_COMPOSED`, or one of them occurs twice.
    """
    parts = reference.split("+")
    if len(parts) > MOST_COMPOSED:
        raise BadReference(f"{_quote_text(reference)} composes {len(parts)} adapters: expected at most {MOST_COMPOSED}")
    if len(set(parts)) < len(parts):
        raise BadReference(f"{_quote_text(reference)} names an adapter twice: name each once")
    return parts


def check_name(name: str) -> str:
    """Return `name` if it is a valid adapter name. Raises BadReference."""
    if not _NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise BadReference(
            f"bad adapter name {_quote_text(name)}: expected 1 to 100 of a-z 0-9 - _ and single dots, "
            "a letter or digit first, such as sentiment or sentiment-v2"
        )
    return name


def check_alias(alias: str) -> str:
    """Return `alias` if it is a valid alias. Raises BadReference."""
    if not ALIAS.fullmatch(alias):
        raise BadReference(
            f"bad alias {_quote_text(alias)}: expected 1 to 32 of a-z 0-9 - _, a letter first, such as production"
        )
    return alias


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference. At most one of `version` and `alias` is set."""

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse `name`, `name@3` or `name@alias`. Raises BadReference."""
        name, at, tail = text.partition("@")
        check_name(name)
        if not at:
            return cls(name)
        if _VERSION.fullmatch(tail):
            return cls(name, version=int(tail))
        if ALIAS.fullmatch(tail):
            return cls(name, alias=tail)
        raise BadReference(
            f"bad reference {_quote_text(text)}: expected after '@' a version number such as {name}@3 "
            f"or an alias such as {name}@production"
        )

    def __str__(self) -> str:
        tail = self.version or self.alias
        return f"{self.name}@{tail}" if tail else self.name
