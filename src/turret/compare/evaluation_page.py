"""The page of one evaluation: self-contained HTML, without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from turret.compare.mistakes import Details, Mistake, Reliability, wilson
from turret.compare.pages import environment
from turret.compare.plots import Mark, reliability
from turret.compare.report_text import shortened
from turret.json_types import JsonMapping

MOST_CLASSES = 20  # in the confusion matrix; of more, the most frequent confusions are listed
PAIRS = 20
MISTAKES = 60
TEXT = 600  # characters of a text
FRACTIONS = ("accuracy", "macro_f1", "micro_f1", "rouge1", "rouge2", "rougeL")  # shown in points


def as_html(
    *,
    version: str,
    digest: str,
    source: str,
    examples: int,
    metrics: JsonMapping,
    details: Details,
    notes: Sequence[str],
    texts: bool,
) -> str:
    """The page.

    Args:
        texts: whether it shows texts of the data and outputs.
    """
    confusion = details.confusion
    page = environment(html=True).get_template("evaluation.html.j2")
    return page.render(
        version=version,
        digest=digest,
        source=source,
        examples=examples,
        headline=headline(version, examples, metrics, details),
        numbers=list(_numbers(metrics)),
        classes=dict(metrics.get("per_class") or {}),
        details=details,
        matrix=confusion if confusion is not None and len(confusion.labels) <= MOST_CLASSES else None,
        pairs=[] if confusion is None else confusion.pairs(PAIRS),
        plot=_plot(details.reliability),
        mistakes=[_shown(each) for each in details.mistakes[:MISTAKES]] if texts else [],
        texts=texts,
        notes=notes,
        parts=(),  # of memory, which the style sheet colours
    )


def headline(version: str, examples: int, metrics: JsonMapping, details: Details) -> str:
    """`news@1 is wrong on 12 of 200 examples`."""
    wrong = len(details.mistakes)
    if details.right_or_wrong:
        return f"{version} is {'right on all' if not wrong else f'wrong on {wrong} of'} {examples} examples"
    name, value = next(((key, metrics[key]) for key in ("rougeL", "loss") if key in metrics), ("examples", examples))
    return f"{version}: {name} {_formatted(name, value)} on {examples} examples"


def _numbers(metrics: JsonMapping) -> Iterator[tuple[str, str]]:
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, _formatted(name, value)


def _formatted(name: str, value: float) -> str:
    return f"{100 * value:.1f}%" if name in FRACTIONS else f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _plot(found: Reliability | None) -> str:
    if found is None or not found.bins:
        return ""
    total = sum(each.count for each in found.bins)
    marks = [
        Mark(
            f"{each.count} answers with {each.low:.2f} to {each.high:.2f}: {each.accuracy:.0%} right",
            "lora",  # a colour of the style sheet
            each.confidence,
            each.accuracy,
            *wilson(each.accuracy, each.count),
        )
        for each in found.bins
    ]
    shares = [each.count / total for each in found.bins]
    return reliability(marks, shares, x_label="probability of the answer", y_label="share that is right")


def _shown(each: Mistake) -> JsonMapping:
    return {
        "row": each.row,
        "text": shortened(each.text, TEXT),
        "right": _words(each.right),
        "given": _words(each.given),
        "confidence": each.confidence,
        "score": each.score,
    }


def _words(value: str | list[str]) -> str:
    return shortened(value if isinstance(value, str) else ", ".join(value) or "no label", TEXT)
