"""A comparison as pages: self-contained HTML, the same as Markdown, and JSON. Knows how it reads, judges nothing.

Every word that came from data is escaped, in HTML by Jinja2 and in SVG by `plots`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from turret.compare import words
from turret.compare.comparison import Comparison, Row
from turret.compare.pages import environment
from turret.compare.plots import Bar, Line, Mark, curves, forest, scatter, stacks

PARTS = ("weights", "trainable", "gradients", "optimiser", "activations")
WORDS = {"within": "as good", "better": "better", "worse": "worse", "undecided": "undecided"}


def write_report(found: Comparison, folder: Path, write: Callable[[Path, str], None]) -> None:
    """report.html, report.md and report.json in a folder; `write` puts one file there, whole."""
    said = found.as_json() | {"headline": headline(found)}
    write(folder / "report.json", json.dumps(said, ensure_ascii=False, indent=1, allow_nan=False))
    write(folder / "report.md", as_markdown(found))
    write(folder / "report.html", as_html(found))


def as_html(found: Comparison) -> str:
    """One page that needs nothing but itself."""
    return environment(True).get_template("report.html.j2").render(**_said(found), plots=dict(_plots(found)))


def as_markdown(found: Comparison) -> str:
    """The same as text; plots are left out, their numbers are in the tables."""
    return environment(False).get_template("report.md.j2").render(**_said(found))


def headline(found: Comparison) -> str:
    """The answer in one sentence."""
    judged = [row for row in found.rows if row.verdict is not None and row.kind not in ("base", "head")]
    against = found.against_label
    margin = f"{found.margin:g} point{'' if found.margin == 1 else 's'}"
    good = [row.label for row in judged if row.verdict and row.verdict.word == "within"]
    better = [row.label for row in judged if row.verdict and row.verdict.word == "better"]
    worse = [row.label for row in judged if row.verdict and row.verdict.word == "worse"]
    open_ = [row.label for row in judged if row.verdict and row.verdict.word == "undecided"]
    parts = []
    if better:
        parts.append(f"{_and(better)} {_is(better)} better than {against}")
    if good:
        parts.append(f"{_and(good)} {_is(good)} as good as {against} within {margin}")
    if worse:
        parts.append(f"{_and(worse)} {_is(worse)} worse by more than {margin}")
    if open_:
        parts.append(f"about {_and(open_)} nothing is decided yet")
    return words.sentence("; ".join(parts) or f"nothing beside {against} has run yet") + "."


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _said(found: Comparison) -> dict[str, Any]:
    labels = {row.spec: row.label for row in found.rows}
    kinds = {row.spec: row.kind for row in found.rows}
    return {
        "c": found,
        "headline": headline(found),
        "labels": labels,
        "kinds": kinds,
        "words": WORDS,
        "metric": "accuracy" if found.metric == "accuracy" else "ROUGE-L",
        "parts": PARTS,
        "classes": _by_class(found),
        "memory": list(_memory(found)),
        "tests": [row for row in found.rows if row.verdict is not None and row.kind != "base"],
        "writes": found.task != "classify",
    }


def _memory(found: Comparison) -> Iterator[tuple[str, str, Any, float]]:
    """(method, predicted or measured, bytes by component, what is above the base)."""
    for row in found.rows:
        for what in ("predicted", "measured"):
            parts = getattr(row.costs, what, None)
            if parts:
                yield row.label, what, parts, sum(parts.get(name, 0) for name in PARTS if name != "weights")


def _by_class(found: Comparison) -> list[tuple[str, int, dict[str, Any]]]:
    """(class, examples, spec -> what is said of it)."""
    rows: dict[str, tuple[str, int, dict[str, Any]]] = {}
    for each in found.classes:
        rows.setdefault(each.label, (each.label, each.examples, {}))[2][each.spec] = each
    return list(rows.values())


# --- plots -----------------------------------------------------------------------------------------------------------


def _plots(found: Comparison) -> Iterator[tuple[str, str]]:
    rows = [row for row in found.rows if row.score is not None and row.costs is not None]
    judged = [_difference(row) for row in rows if row.verdict is not None and row.kind != "base"]
    metric = "accuracy" if found.metric == "accuracy" else "ROUGE-L"
    if judged:
        zero = f"{found.against_label}, and {found.margin:g} to either side"
        yield "forest", forest(judged, found.margin, unit=f"points of {metric}", zero=zero)
    trained = [row for row in rows if row.kind != "base"]
    if trained:
        yield (
            "parameters",
            scatter(
                [_mark(row, row.costs.trainable) for row in trained if row.costs and row.costs.trainable],
                x_label="trainable parameters",
                y_label=metric,
            ),
        )
        yield (
            "time",
            scatter(
                [_mark(row, span.mean, span) for row in trained if row.costs and (span := row.costs.train_seconds)],
                x_label="seconds of training",
                y_label=metric,
            ),
        )
        yield (
            "memory",
            scatter(
                [
                    _mark(row, span.mean / 1e6, span, 1e-6)
                    for row in trained
                    if row.costs and (span := row.costs.above_base) and span.mean > 0
                ],
                x_label="peak memory above the loaded base, MB",
                y_label=metric,
            ),
        )
        yield (
            "components",
            stacks(list(_stacked(trained)), unit="MB while training, without the program itself", number=whole),
        )
    if found.curves:
        yield "curves", curves(list(_lines(found)), x_label="training examples", y_label=metric)


def whole(value: float) -> str:
    """Megabytes in a plot."""
    return f"{value:,.0f}"


def _difference(row: Row) -> Mark:
    assert row.verdict is not None
    d = row.verdict.difference
    return Mark(row.label, row.kind, d.mean, d.mean, d.low, d.high)


def _mark(row: Row, x: float, span: Any = None, factor: float = 1.0) -> Mark:
    assert row.score is not None
    ends = (None, None) if span is None else (factor * span.least, factor * span.most)
    return Mark(row.label, row.kind, max(x, 1e-9), row.score.mean, row.score.low, row.score.high, *ends)


def _stacked(rows: list[Row]) -> Iterator[Bar]:
    for row in rows:
        if row.costs is None:
            continue
        for said, parts in (("predicted", row.costs.predicted), ("measured", row.costs.measured)):
            if parts:
                yield Bar(f"{row.label}, {said}", tuple((name, parts.get(name, 0) / 1e6) for name in PARTS))


def _lines(found: Comparison) -> Iterator[Line]:
    for row in found.rows:
        marks = [
            Mark(row.label, row.kind, each.examples, each.score.mean, each.score.low, each.score.high)
            for each in found.curves
            if each.spec == row.spec
        ]
        if len(marks) > 1:
            yield Line(row.label, row.kind, tuple(marks))
