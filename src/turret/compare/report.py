"""Writes a comparison as self-contained HTML, Markdown and JSON.

All text from data is escaped: in HTML by Jinja2, in SVG by `plots`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from turret.compare import report_text
from turret.compare.comparison import Comparison, ComparisonRow, PerClass
from turret.compare.design import is_floor
from turret.compare.evaluation_page import describe_run, environment
from turret.compare.plots import Bar, Line, LossCurve, Mark, curves, forest, loss_curves, scatter, stacks
from turret.compare.results import MeanRange
from turret.json_types import JsonObject
from turret.methods import method_named
from turret.tasks import task_of

PARTS = ("weights", "trainable", "gradients", "optimiser", "prepared", "activations")
WORDS = {"within": "as good", "better": "better", "worse": "worse", "undecided": "undecided"}


def write_report(result: Comparison, folder: Path, write: Callable[[Path, str], None]) -> None:
    """Write report.html, report.md and report.json into a folder. write: (path, text), writes one file."""
    content = result.as_json() | {"headline": headline(result)}
    write(folder / "report.json", json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False))
    write(folder / "report.md", as_markdown(result))
    write(folder / "report.html", as_html(result))


def as_html(result: Comparison) -> str:
    """The report as one self-contained page."""
    template = environment(True).get_template(f"{_template(result)}.html.j2")
    return template.render(**_values(result), plots=dict(_plots(result)))


def as_markdown(result: Comparison) -> str:
    """The report as Markdown, without the plots; their numbers are in the tables."""
    return environment(False).get_template(f"{_template(result)}.md.j2").render(**_values(result))


def _template(result: Comparison) -> str:
    return "composition" if result.composition else "report"


def headline(result: Comparison) -> str:
    """The result in one sentence, in the words that a reader would repeat; the intervals stand in the verdicts."""
    against, margin = _title(result.against_label), f"{result.margin:g} point{'' if result.margin == 1 else 's'}"
    judged = sorted(
        ((row, row.verdict) for row in result.rows if row.verdict is not None),
        key=lambda pair: -pair[1].difference.mean,
    )
    groups = {word: [pair for pair in judged if pair[1].word == word] for word in WORDS}
    names = {word: _and([_title(row.label) for row, _ in pairs]) for word, pairs in groups.items() if pairs}
    apart = {word: _apart([verdict.difference.mean for _, verdict in pairs]) for word, pairs in groups.items() if pairs}
    be = {word: "is" if len(pairs) == 1 else "are" for word, pairs in groups.items()}
    parts = []
    if "better" in names:
        parts.append(f"{names['better']} beat{'s' if be['better'] == 'is' else ''} {against} by {apart['better']}")
    if "within" in names:
        parts.append(f"{names['within']} {be['within']} as good as {against} within {margin}")
    if "undecided" in names:
        parts.append(f"whether {names['undecided']} {be['undecided']} as good as {against} is not decided yet")
    if "worse" in names:
        parts.append(f"{names['worse']} {be['worse']} {apart['worse']} behind {against}")
    parts += [
        f"in {_title(row.label)} {len(row.collapses)} of {len(row.seeds)} collapsed"
        for row in result.rows
        if row.collapses
    ]
    lost = [_title(row.label) for row in result.rows if row.learnt_nothing and row.trains]
    parts += [f"{_and(lost)} learnt nothing"] if lost else []
    short = [_title(row.label) for row in result.rows if row.trained_out is False]
    both = len(short) > 1 and set(short) == {_title(row.label) for row, _ in judged if row.trains}
    if short:
        who = ("both" if len(short) == 2 else "all of them") if both else _and(short)
        parts.append(f"{who} would gain from more epochs")
    parts += [f"{_title(row.label)} did not run" for row in result.rows if row.failed and row.score is None]
    if not judged:
        parts = [f"nothing is judged against {against} yet", *parts]
    return report_text.sentence("; ".join(parts)) + "."


def _title(label: str) -> str:
    """`LoRA r=4`, `prefix`, `the bare base`."""
    word, space, rest = label.partition(" ")
    return "the bare base" if label == "base" else (method_named(word).title or word) + space + rest


def _apart(means: Sequence[float]) -> str:
    """`40 to 49 points`, `0.8 points`: the sizes of some differences."""
    low, high = sorted(abs(each) for each in (min(means, key=abs), max(means, key=abs)))
    few, many = (f"{each:.1f}" if high < 10 else f"{each:.0f}" for each in (low, high))
    return f"{many} point{'' if many == '1.0' else 's'}" if few == many else f"{few} to {many} points"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _values(result: Comparison) -> JsonObject:
    """The variables of the templates."""
    return {
        "c": result,
        "headline": headline(result),
        "labels": {row.spec: row.label for row in result.rows},
        "kinds": {row.spec: row.kind for row in result.rows},
        "words": WORDS,
        "metric": task_of(result.task).metric_label,
        "parts": PARTS,
        "classes": _by_class(result),
        "memory": [
            (label, what, parts, sum(parts.get(each, 0) for each in PARTS if each != "weights"))
            for label, what, parts in _memory(result.rows)
        ],
        "tests": [row for row in result.rows if row.verdict is not None and row.kind != "base"],
        "forgets": any(row.costs is not None and row.costs.forgetting is not None for row in result.rows),
        "right_or_wrong": task_of(result.task).right_or_wrong,
        "made": list(describe_run(result.made)),
        "same_steps": len({row.steps for row in result.rows if row.steps}) < 2,
    }


def _memory(rows: Sequence[ComparisonRow]) -> Iterator[tuple[str, str, Mapping[str, int]]]:
    """(method, predicted or measured, bytes by component)."""
    for row, costs in ((row, row.costs) for row in rows if row.costs is not None):
        for what, parts in (("predicted", costs.predicted), ("measured", costs.measured)):
            if parts:
                yield row.label, what, parts


def _by_class(result: Comparison) -> list[tuple[str, int, dict[str, PerClass]]]:
    """(class, examples, spec -> its result)."""
    rows: dict[str, tuple[str, int, dict[str, PerClass]]] = {}
    for each in result.classes:
        rows.setdefault(each.label, (each.label, each.examples, {}))[2][each.spec] = each
    return list(rows.values())


# --- plots -----------------------------------------------------------------------------------------------------------


def _plots(result: Comparison) -> Iterator[tuple[str, str]]:
    rows = [row for row in result.rows if row.score is not None and row.costs is not None]
    contenders = [row for row in rows if not is_floor(row.kind) and not row.learnt_nothing] or rows
    judged = [row for row in rows if row.verdict is not None]
    metric = f"{task_of(result.task).metric_label}, points"
    if judged:
        zero = f"{result.against_label}, and {result.margin:g} to either side"
        scale = [_difference(row) for row in contenders if row.verdict is not None] or None
        marks = [_difference(row) for row in judged]
        yield "forest", forest(marks, result.margin, unit=f"difference in {metric}", zero=zero, scale=scale)
    if result.composition:  # nothing was trained for it
        return
    trained = [row for row in rows if row.trains]
    if trained:
        yield from _against_costs(trained, [_mark(row, 1.0) for row in contenders if row.trains] or None, metric)
        bars = [
            Bar(f"{label}, {what}", tuple((name, parts.get(name, 0) / 1e6) for name in PARTS))
            for label, what, parts in _memory(trained)
        ]
        yield (
            "components",
            stacks(bars, unit="MB in training, without Python and its libraries", number=whole_megabytes),
        )
    losses = list(_courses(trained))
    if losses:
        label = ", ".join(filter(None, ("loss on the training examples", task_of(result.task).measures["loss"].unit)))
        yield "losses", loss_curves(losses, x_label="% of the training", y_label=label)
    if result.curves:
        yield "curves", curves(list(_lines(result)), x_label="training examples", y_label=metric)


def _against_costs(trained: list[ComparisonRow], scale: list[Mark] | None, metric: str) -> Iterator[tuple[str, str]]:
    """Quality against trained parameters, time and memory."""
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
    """The mean loss of each row, and the losses of each training that collapsed."""
    for row in rows:
        lost = {each.seed for each in row.collapses}
        good = [values for seed, values in row.losses if seed not in lost]
        shortest = min((len(values) for values in good), default=0)
        if shortest > 1:
            yield LossCurve(row.label, row.kind, tuple(np.mean([v[:shortest] for v in good], axis=0).tolist()))
        for seed, values in row.losses:
            if seed in lost and len(values) > 1:
                yield LossCurve(f"{row.label} {seed}", row.kind, values, dashed=True)


def whole_megabytes(value: float) -> str:
    """Megabytes as text in a plot."""
    return f"{value:,.0f}"


def _difference(row: ComparisonRow) -> Mark:
    assert row.verdict is not None
    d = row.verdict.difference
    return Mark(row.label, row.kind, d.mean, d.mean, d.low, d.high)


def _mark(row: ComparisonRow, x: float, span: MeanRange | None = None, factor: float = 1.0) -> Mark:
    assert row.score is not None
    ends = (None, None) if span is None else (factor * span.least, factor * span.most)
    return Mark(row.label, row.kind, max(x, 1e-9), row.score.mean, row.score.low, row.score.high, *ends)


def _lines(result: Comparison) -> Iterator[Line]:
    for row in result.rows:
        marks = [
            Mark(row.label, row.kind, each.examples, each.score.mean, each.score.low, each.score.high)
            for each in result.curves
            if each.spec == row.spec
        ]
        if len(marks) > 1:
            yield Line(row.label, row.kind, tuple(marks))
