"""How any page here is made: templates beside this module, every word from outside escaped, numbers by `words`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from turret.compare.report_text import chance, count, megabytes, milliseconds, percent, points, seconds, signed


def environment(html: bool) -> Environment:
    """For HTML, where all is escaped, or for Markdown, where the filter `cell` does it."""
    made = Environment(
        loader=PackageLoader("turret.compare", "."),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "count": count, "mb": megabytes, "ms": milliseconds, "percent": percent, "points": points,
        "seconds": seconds, "signed": signed, "cell": _cell, "p": chance,
    }  # fmt: skip
    return made


def _cell(text: object) -> str:
    """Someone's words in a cell of a Markdown table."""
    line = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\|`*_[]<>#" else c for c in line)


def facts(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, value) of when, where and with what the trainings were made."""
    if not said:
        return
    first, last = str(said["from"])[:10], str(said["to"])[:10]
    yield "date", first if first == last else f"{first} to {last}"
    for key in ("device", "threads", "precision", "commit"):
        value = said.get(key)
        if value is not None:
            yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for versions in said["versions"] if isinstance(said["versions"], list) else [said["versions"]]:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
