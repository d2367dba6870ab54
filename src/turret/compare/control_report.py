"""A finding on control as pages: self-contained HTML, Markdown and JSON. Knows how it reads, counts nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turret.compare.control_rates import Control, headline
from turret.compare.evidence import Interval
from turret.compare.pages import environment, facts
from turret.compare.plots import Mark, rates

PARTS = ("asked", "others")


def write_report(found: Control, folder: Path, write: Callable[[Path, str], None]) -> None:
    """report.html, report.md and report.json in a folder; `write` puts one file there, whole."""
    write(folder / "report.json", json.dumps(found.as_json(), ensure_ascii=False, indent=1, allow_nan=False))
    write(folder / "report.md", as_markdown(found))
    write(folder / "report.html", as_html(found))


def as_html(found: Control) -> str:
    """One page that needs nothing but itself."""
    return environment(True).get_template("control.html.j2").render(**_said(found), plot=_plot(found))


def as_markdown(found: Control) -> str:
    return environment(False).get_template("control.md.j2").render(**_said(found))


def _said(found: Control) -> dict[str, Any]:
    labels = {each.spec: each.label for each in found.rated}
    return {"c": found, "headline": headline(found), "labels": labels, "parts": (), "made": list(facts(found.made))}


def _plot(found: Control) -> str:
    """Both rates of every method, with chance and what the classifier makes of references as lines."""
    marks = []
    for each in found.rated:
        marks.append(_mark(f"{each.label}, by the classifier", each.kind, each.by_classifier))
        marks.append(_mark(f"{each.label}, by ROUGE", each.kind, each.by_rouge))
    lines = [(found.chance, "chance"), (float(found.judge["accuracy"]), "classifier on references")]
    return rates(marks, lines, unit="% of outputs that are of the asked aspect") if marks else ""


def _mark(label: str, kind: str, found: Interval) -> Mark:
    return Mark(label, kind, found.mean, found.mean, found.low, found.high)
