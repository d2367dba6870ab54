"""The templates, and their filters for numbers. Every value is escaped. A missing name in a template is an error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, select_autoescape
from markupsafe import Markup, escape

from turret import __version__
from turret.compare.report_text import count, megabytes, milliseconds, percent
from turret.compare.report_text import seconds as in_seconds
from turret.json_types import JsonMapping, JsonValue
from turret.methods import said
from turret.server.auth import Caller
from turret.server.state import ServerState
from turret.timestamp import to_minute

Context: TypeAlias = Mapping[str, Any]  # what a template shows: Jinja takes values of any type
FOLDER = Path(__file__).parent
MAIN_METRICS = ("accuracy", "rougeL", "loss")  # the first one that was measured is shown if there is room for one
SHARES = ("accuracy", "f1", "precision", "recall", "rouge", "micro", "macro")
METRICS = {  # key -> name, and what it measures
    "accuracy": ("accuracy", "share of the examples that are answered right"),
    "micro_f1": ("F1, micro", "F1 of all labels of all examples together"),
    "macro_f1": ("F1, macro", "mean F1 of the classes; each class counts the same"),
    "ece": ("calibration error", "mean distance between the probability and the share that is right, 0 to 1"),
    "loss": ("loss", "mean cross-entropy in nats, of an example or a token"),
    "perplexity": ("perplexity", "exp of the loss of a token; 1 is the best"),
    "rouge1": ("ROUGE-1", "overlap of words with the reference, F1"),
    "rouge2": ("ROUGE-2", "overlap of pairs of words with the reference, F1"),
    "rougeL": ("ROUGE-L", "longest common sequence of words with the reference, F1"),
    "bleu": ("BLEU", "overlap of up to four words with the reference, 0 to 100"),
    "neutral": ("neutral text", "increase of the loss of a token on neutral text, in nats"),
    "neutral_low": ("neutral text, from", "lower end of the 95% interval, in nats"),
    "neutral_high": ("neutral text, to", "upper end of the 95% interval, in nats"),
}
UNITS = {"loss": " nats", "bleu": " of 100", "neutral": " nats", "neutral_low": " nats", "neutral_high": " nats"}
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
    """Of a static file. Its URL contains the digest, so browsers may cache it permanently."""
    return hashlib.sha256((FOLDER / "static" / file).read_bytes()).hexdigest()[:12]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=select_autoescape(("j2", "html"), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "age": age,
        "bytes": size,
        "code": code,
        "count": count,
        "evidence": evidence,
        "main_metric": main_metric,
        "means": means,
        "method": said,
        "metric": metric,
        "ms": milliseconds,
        "number": number,
        "percent": percent,
        "seconds": in_seconds,
        "share": share,
        "short": short,
        "when": when,
        "whole": whole,
    }
    environment.globals |= {"digest": digest, "pages": PAGES, "version_of_turret": __version__}
    return environment


def template(name: str) -> Template:
    return _environment().get_template(name)


# Any: as in `Context`.
def page(request: Request, state: ServerState, name: str, status: int = 200, /, **values: Any) -> HTMLResponse:
    """A template with the values that every page needs, and those of this one."""
    caller: Caller = request.state.caller
    common = {
        "caller": caller,
        "bases": [each.name for each in state.engines.bases],
        "form_token": state.guard.sessions.form_token(caller.session),
        "open": state.guard.open,
        "live": is_htmx(request),
    }
    return HTMLResponse(template(name).render(common | values), status)


def is_htmx(request: Request) -> bool:
    """Whether htmx asks for a part of a page."""
    return "hx-request" in request.headers


# --- filters ---------------------------------------------------------------------------------------------------------


def age(moment: str | None) -> str:
    """`just now`, `5 min ago`, `3 days ago`."""
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
    return to_minute(moment) if moment else ""


def number(value: JsonValue) -> str:
    """A measured value with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def evidence(value: float) -> str:
    """Three digits, with a power of ten only from 1e7."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def size(value: float) -> str:
    """`640 B`, `3.2 kB`, `91 MB`."""
    return f"{value:.0f} B" if value < 1000 else megabytes(value)


def share(value: float) -> str:
    """`5%`, `12.5%`."""
    return f"{100 * value:.3g}%"


def short(digest: str | None) -> str:
    """The first 12 digits of a digest."""
    return (digest or "").removeprefix("sha256:")[:12]


def main_metric(measured: JsonMapping) -> tuple[str, str, str] | None:
    """(metric, value, split) of the metric to show if there is room for one."""
    for split in ("test", "validation"):
        values = measured.get(split) or {}
        for name in MAIN_METRICS:
            if name in values:
                return name, metric(values[name], name), split
    return None


def metric(value: JsonValue, name: str = "") -> str:
    """A metric: shares as percent, other values as numbers."""
    if isinstance(value, float) and 0 <= value <= 1 and name.lower().startswith(SHARES) and not name.endswith("loss"):
        return f"{100 * value:.1f}%"
    return number(value)


def means(key: str) -> tuple[str, str, str]:
    """The name of a metric, what it measures with the key that a gate takes, and the unit after its value."""
    name, text = METRICS.get(key, (key.replace("_", " "), ""))
    return name, f"{text} (key: {key})" if text else f"key: {key}", UNITS.get(key, "")


def code(text: str) -> Markup:
    """A line of text, escaped, with the parts between backquotes as code."""
    parts = str(text).split("`")
    return Markup("").join(
        escape(part) if index % 2 == 0 else Markup("<code>{}</code>").format(part) for index, part in enumerate(parts)
    )


def redirect(request: Request, url: str) -> Response:
    """Go to another page, for htmx or for a browser without scripts."""
    return Response(headers={"hx-redirect": url}) if is_htmx(request) else RedirectResponse(url, 303)
