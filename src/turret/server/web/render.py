"""Templates, and words for the numbers in them. Everything that is put into a page is escaped; a name that a template
misses is an error. Refuses to know where values come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape
from markupsafe import Markup, escape

from turret import __version__
from turret.compare.report_text import count, megabytes, milliseconds, percent
from turret.compare.report_text import seconds as in_seconds
from turret.server.state import ServerState

HERE = Path(__file__).parent
CHIEF = ("accuracy", "rougeL", "loss")  # the first of these is what one column has room for
SHARES = ("accuracy", "f1", "precision", "recall", "rouge", "micro", "macro")
PAGES = (
    ("adapters", "Adapters"),
    ("runs", "Runs"),
    ("comparisons", "Comparisons"),
    ("playground", "Playground"),
    ("experiments", "Experiments"),
    ("store", "Store"),
)


@cache
def digest(file: str) -> str:
    """Of a static file: its address changes with it, so that a browser may keep it for ever."""
    return hashlib.sha256((HERE / "static" / file).read_bytes()).hexdigest()[:12]


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=select_autoescape(("j2", "html"), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "age": age, "bytes": size, "chief": chief, "code": code, "count": count, "evidence": evidence,
        "ms": milliseconds, "number": number, "percent": percent, "said": said, "seconds": in_seconds, "share": share,
        "short": short, "when": when, "whole": whole,
    }  # fmt: skip
    made.globals |= {"digest": digest, "pages": PAGES, "version_of_turret": __version__}
    return made


def template(name: str) -> Template:
    return _environment().get_template(name)


def page(request: Request, here: ServerState, name: str, status: int = 200, /, **values: Any) -> HTMLResponse:
    """The template with what every page needs."""
    asker = request.state.asker
    common = {
        "asker": asker,
        "base": here.base_id,
        "form_token": here.guard.sessions.form_token(asker.session),
        "open": here.guard.open,
        "live": live(request),
    }
    return HTMLResponse(template(name).render(common | values), status)


def live(request: Request) -> bool:
    """Whether htmx asks for a part of a page."""
    return "hx-request" in request.headers


# --- words -----------------------------------------------------------------------------------------------------------


def age(moment: str | None) -> str:
    """How long ago that was: `just now`, `5 min ago`, `3 days ago`."""
    if not moment:
        return "never"
    passed = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    for size, unit in ((86400, "day"), (3600, "h"), (60, "min")):
        if passed >= size:
            many = int(passed // size)
            return f"{many} {unit}{'s' if unit == 'day' and many > 1 else ''} ago"
    return "just now" if passed < 10 else f"{passed:.0f} s ago"


def when(moment: str | None) -> str:
    """`2026-11-25 10:13 UTC`."""
    return f"{moment[:16].replace('T', ' ')} UTC" if moment else ""


def number(value: Any) -> str:
    """A measured value: four digits, however large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def evidence(value: float) -> str:
    """Three digits, and no powers of ten while it can be read without."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def size(value: float) -> str:
    """`640 B`, `3.2 kB`, `91 MB`."""
    return f"{value:.0f} B" if value < 1000 else megabytes(value)


def share(value: float) -> str:
    """`5%`, `12.5%`."""
    return f"{100 * value:.3g}%"


def short(digest: str | None) -> str:
    """The beginning of a digest, enough to know it by."""
    return (digest or "").removeprefix("sha256:")[:12]


def chief(measured: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """(metric, value, split): the one to show where there is room for one."""
    for split in ("test", "validation"):
        values = measured.get(split) or {}
        for name in CHIEF:
            if name in values:
                return name, said(values[name], name), split
    return None


def said(value: Any, name: str = "") -> str:
    """A metric as people say it: shares as percent, the rest as numbers."""
    if isinstance(value, float) and 0 <= value <= 1 and name.lower().startswith(SHARES) and not name.endswith("loss"):
        return f"{100 * value:.1f}%"
    return number(value)


def code(text: str) -> Markup:
    """A line of ours, its `commands` set as code; everything in it escaped."""
    parts = str(text).split("`")
    shown = [
        escape(part) if place % 2 == 0 else Markup("<code>{}</code>").format(part) for place, part in enumerate(parts)
    ]
    return Markup("").join(shown)
