"""Writes the result of a control experiment as self-contained HTML, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from turret.compare.control_rates import Control, headline
from turret.compare.evidence import Interval
from turret.compare.pages import environment, facts
from turret.compare.plots import Mark, rates


def write_report(result: Control, folder: Path, write: Callable[[Path, str], None]) -> None:
    """Write report.html, report.md and report.json into a folder. write: (path, text), writes one file."""
    write(folder / "report.json", json.dumps(result.as_json(), ensure_ascii=False, indent=1, allow_nan=False))
    write(folder / "report.md", as_markdown(result))
    write(folder / "report.html", as_html(result))


def as_html(result: Control) -> str:
    """The report as one self-contained page."""
    return _rendered("control.html.j2", True, result)


def as_markdown(result: Control) -> str:
    """The report as Markdown, without its plot."""
    return _rendered("control.md.j2", False, result)


def _rendered(template: str, html: bool, result: Control) -> str:
    return (
        environment(html)
        .get_template(template)
        .render(
            c=result,
            headline=headline(result),
            labels={each.spec: each.label for each in result.rated},
            made=list(facts(result.made)),
            parts=(),  # of memory, which the style sheet colours
            plot=_plot(result) if html else "",
        )
    )


def _plot(result: Control) -> str:
    """Both rates of each method, with lines at chance and at the classifier's accuracy on references."""
    marks = []
    for each in result.rated:
        marks.append(_mark(f"{each.label}, by the classifier", each.kind, each.by_classifier))
        marks.append(_mark(f"{each.label}, by ROUGE", each.kind, each.by_rouge))
    lines = [(result.chance, "chance"), (float(result.judge["accuracy"]), "classifier on references")]
    return rates(marks, lines, unit="% of outputs of the requested aspect") if marks else ""


def _mark(label: str, kind: str, rate: Interval) -> Mark:
    return Mark(label, kind, rate.mean, rate.mean, rate.low, rate.high)
