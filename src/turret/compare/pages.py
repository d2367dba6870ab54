"""The template environment of the reports: the templates of this package, escaping, and number formats."""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import Environment, PackageLoader, StrictUndefined

from turret.compare.report_text import (
    chance,
    count,
    megabytes,
    milliseconds,
    percent,
    points,
    seconds,
    sentence,
    signed,
)
from turret.json_types import JsonMapping, JsonValue


def environment(html: bool) -> Environment:
    """The environment for HTML, which escapes everything, or for Markdown, where the filter `cell` escapes."""
    templates = Environment(
        loader=PackageLoader("turret.compare", "."),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "count": count, "mb": megabytes, "ms": milliseconds, "percent": percent, "points": points,
        "seconds": seconds, "sentence": sentence, "signed": signed, "cell": _cell, "p": chance,
    }  # fmt: skip
    return templates


def _cell(value: JsonValue) -> str:
    """A value as text in Markdown, on one line and escaped."""
    line = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\|`*_[]<>#" else c for c in line)


def facts(made: JsonMapping) -> Iterator[tuple[str, str]]:
    """(name, value) of dates, device and versions of the trainings. made: by `results.made_with`."""
    if not made:
        return
    first, last = str(made["from"])[:10], str(made["to"])[:10]
    yield "date", first if first == last else f"{first} to {last}"
    for key in ("device", "threads", "precision", "commit"):
        value = made.get(key)
        if value is not None:
            yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for versions in made["versions"] if isinstance(made["versions"], list) else [made["versions"]]:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
