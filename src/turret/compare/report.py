"""A comparison as pages: self-contained HTML, the same as Markdown, and JSON. Knows how it reads, judges nothing.

Every word that came from data is escaped, in HTML by Jinja2 and in SVG by `plots`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turret.compare import report_text
from turret.compare.candidates import is_floor
from turret.compare.comparison import Comparison, ComparisonRow
from turret.compare.pages import environment, facts
from turret.compare.plots import Bar, Line, LossCurve, Mark, courses, curves, forest, scatter, stacks
from turret.tasks import task_of

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
    """The answer in one sentence: every method that was judged, with its number."""
    against, margin = found.against_label, f"{found.margin:g} point{'' if found.margin == 1 else 's'}"
    said = {
        "better": f"better than {against}",
        "within": f"as good as {against} within {margin}",
        "undecided": f"not decided against {against} within {margin}",
        "worse": f"worse than {against} by more than {margin}",
    }
    parts = []
    for word, words_ in said.items():
        names = [_named(row) for row in found.rows if row.verdict is not None and row.verdict.word == word]
        if names:
            parts.append(f"{_and(names)} {'is' if len(names) == 1 else 'are'} {words_}")
    parts += [f"{row.label} did not run" for row in found.rows if row.failed and row.score is None]
    if not any(row.verdict is not None for row in found.rows):
        parts = [f"nothing is judged against {against} yet", *parts]
    return report_text.sentence("; ".join(parts)) + "."


def _named(row: ComparisonRow) -> str:
    """`lora (-0.7, -1.8 to +0.5)`: in points; of a floor the mean alone."""
    assert row.verdict is not None
    d = row.verdict.difference
    span = report_text.plus(d.mean)
    if not row.verdict.claimed or d.open:
        span = f"{span}, no interval"
    elif not is_floor(row.kind):
        span = f"{span}, {report_text.plus(d.low)} to {report_text.plus(d.high)}"
    marks = row.marks if row.kind != "base" else ()
    return f"{row.label} ({'; '.join((*marks, span))})"


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
        "metric": task_of(found.task).metric_label,
        "parts": PARTS,
        "classes": _by_class(found),
        "memory": list(_memory(found)),
        "tests": [row for row in found.rows if row.verdict is not None and row.kind != "base"],
        "writes": task_of(found.task).generates,
        "made": list(facts(found.made)),
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
    contenders = [row for row in rows if not is_floor(row.kind) and not row.learnt_nothing] or rows
    judged = [row for row in rows if row.verdict is not None]
    metric = task_of(found.task).metric_label
    if judged:
        zero = f"{found.against_label}, and {found.margin:g} to either side"
        scale = [_difference(row) for row in contenders if row.verdict is not None] or None
        marks = [_difference(row) for row in judged]
        yield "forest", forest(marks, found.margin, unit=f"points of {metric}", zero=zero, scale=scale)
    trained = [row for row in rows if row.kind != "base"]
    if trained:
        yield from _against_costs(
            trained, [_mark(row, 1.0) for row in contenders if row.kind != "base"] or None, metric
        )
        yield (
            "components",
            stacks(list(_stacked(trained)), unit="MB while training, without the program itself", number=whole),
        )
    losses = list(_courses(trained))
    if losses:
        yield "losses", courses(losses, x_label="% of the training", y_label="loss on the training examples")
    if found.curves:
        yield "curves", curves(list(_lines(found)), x_label="training examples", y_label=metric)


def _against_costs(trained: list[ComparisonRow], scale: list[Mark] | None, metric: str) -> Iterator[tuple[str, str]]:
    """Quality against what is trained, against time and against memory."""
    costly = [(row, row.costs) for row in trained if row.costs is not None]
    marks = {
        ("parameters", "trainable parameters"): [_mark(row, each.trainable) for row, each in costly if each.trainable],
        ("time", "seconds of training"): [
            _mark(row, span.mean, span) for row, each in costly if (span := each.train_seconds)
        ],
        ("memory", "peak memory above the loaded base, MB"): [
            _mark(row, span.mean / 1e6, span, 1e-6)
            for row, each in costly
            if (span := each.above_base) and span.mean > 0
        ],
    }
    for (key, label), some in marks.items():
        if some:
            yield key, scatter(some, x_label=label, y_label=metric, scale=scale)


def _courses(rows: Sequence[ComparisonRow]) -> Iterator[LossCurve]:
    """The mean loss of each row, and beside it every training that collapsed."""
    for row in rows:
        lost = {each.seed for each in row.collapses}
        good = [values for seed, values in row.losses if seed not in lost]
        shortest = min((len(values) for values in good), default=0)
        if shortest > 1:
            yield LossCurve(row.label, row.kind, tuple(np.mean([v[:shortest] for v in good], axis=0).tolist()))
        for seed, values in row.losses:
            if seed in lost and len(values) > 1:
                yield LossCurve(f"{row.label} {seed}", row.kind, values, dashed=True)


def whole(value: float) -> str:
    """Megabytes in a plot."""
    return f"{value:,.0f}"


def _difference(row: ComparisonRow) -> Mark:
    assert row.verdict is not None
    d = row.verdict.difference
    return Mark(row.label, row.kind, d.mean, d.mean, d.low, d.high)


def _mark(row: ComparisonRow, x: float, span: Any = None, factor: float = 1.0) -> Mark:
    assert row.score is not None
    ends = (None, None) if span is None else (factor * span.least, factor * span.most)
    return Mark(row.label, row.kind, max(x, 1e-9), row.score.mean, row.score.low, row.score.high, *ends)


def _stacked(rows: list[ComparisonRow]) -> Iterator[Bar]:
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
