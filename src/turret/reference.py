"""What a stored adapter is called: `name`, `name@3` or `name@production`. Only reads text; refuses to know the store.

Grammar, in ASCII only:

- `reference = name [ "@" ( version | alias ) ]`
- `name`: a small letter or digit, then up to 99 of these, `-`, `_` and `.`; no two dots in a row, none at the end
- `version`: 1 to 999999999, without leading zeros
- `alias`: a small letter, then up to 31 small letters, digits, `-` or `_`

So a name can never climb out of a folder, pass for an option, hide a NUL, or look like another in other letters.
A plain name means `@production` where that alias exists, else the newest version; the store decides which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from turret.errors import BadReference

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)


def _quoted(text: str) -> str:
    """What was given, in visible ASCII and short enough for one line."""
    shown = ascii(text)
    return shown if len(shown) <= 48 else f"{shown[:44]}...' ({len(text)} characters)"


def check_name(name: str) -> str:
    """The name itself if it may name an adapter; raises BadReference."""
    if not _NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise BadReference(
            f"bad adapter name {_quoted(name)}: expected 1 to 100 of a-z 0-9 - _ and single dots, "
            "a letter or digit first, such as sentiment or sentiment-v2"
        )
    return name


def check_alias(alias: str) -> str:
    """The alias itself if it may be one; raises BadReference."""
    if not _ALIAS.fullmatch(alias):
        raise BadReference(
            f"bad alias {_quoted(alias)}: expected 1 to 32 of a-z 0-9 - _, a letter first, such as production"
        )
    return alias


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference: at most one of `version` and `alias` is set."""

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        name, at, tail = text.partition("@")
        check_name(name)
        if not at:
            return cls(name)
        if _VERSION.fullmatch(tail):
            return cls(name, version=int(tail))
        if _ALIAS.fullmatch(tail):
            return cls(name, alias=tail)
        raise BadReference(
            f"bad reference {_quoted(text)}: expected after '@' a version number such as {name}@3 "
            f"or an alias such as {name}@production"
        )

    def __str__(self) -> str:
        tail = self.version or self.alias
        return f"{self.name}@{tail}" if tail else self.name
