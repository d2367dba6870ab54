"""How any page here is made: templates beside this module, every word from outside escaped, numbers by `words`."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from turret.compare.words import chance, count, megabytes, milliseconds, percent, points, seconds, signed


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
