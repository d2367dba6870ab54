"""The page of one evaluation: self-contained HTML, without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from turret.compare.plots import Mark, agreement, reliability
from turret.compare.report_text import (
    chance,
    count,
    megabytes,
    milliseconds,
    percent,
    points,
    seconds,
    sentence,
    shortened,
    signed,
)
from turret.compare.results import Details, Mistake, Reliability, wilson
from turret.json_types import JsonMapping, JsonValue

# --- pages ------------------------------------------------------------------------------------------------------------
# The template environment of the reports: the templates of this package, escaping, and number formats.


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
        "count": count,
        "mb": megabytes,
        "ms": milliseconds,
        "percent": percent,
        "points": points,
        "seconds": seconds,
        "sentence": sentence,
        "signed": signed,
        "cell": _cell,
        "p": chance,
    }
    return templates


def _cell(value: JsonValue) -> str:
    """A value as text in Markdown, on one line and escaped."""
    line = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\|`*_[]<>#" else c for c in line)


def describe_run(made: JsonMapping) -> Iterator[tuple[str, str]]:
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


# --- evaluation page --------------------------------------------------------------------------------------------------


MOST_CLASSES = 20  # in the confusion matrix; of more, the most frequent confusions are listed
PAIRS = 20
MISTAKES = 60
MOST_DOTS = 400
FIRST_MISTAKES = 8  # the others are folded
NAMES = {  # of metrics: for a reader, and what they mean
    "accuracy": ("accuracy", "the share of right answers"),
    "macro_f1": ("macro F1", "the mean of the F1 of all classes, so that a rare class counts as much as a common one"),
    "micro_f1": ("micro F1", "the F1 over all decisions, so that a common label counts more"),
    "loss": ("loss (nats)", "the mean of minus the logarithm of the right answer's probability; 0 is perfect"),
    "ece": (
        "calibration error",
        "ECE: how far probabilities are from how often answers are right, on average",
    ),
    "nearness": (
        "1 - MAE / range",
        "how near answers are, as a share of the range of the training values; 1 is perfect",
    ),
    "mae": ("MAE", "the mean distance of an answer from the right one"),
    "rmse": ("RMSE", "the root of the mean squared distance, so that large errors count more"),
    "pearson": ("Pearson", "the correlation of answers and right numbers; 1 is a straight line upwards"),
    "spearman": ("Spearman", "the correlation of their ranks; 1 is the same order"),
    "quadratic_kappa": ("quadratic kappa", "agreement beyond chance, where far levels count more; 1 is perfect"),
    "mrr": ("MRR at 10", "1 / the rank of the first relevant passage, as a mean over queries"),
    "ndcg": ("nDCG at 10", "how high relevant passages are ranked, as a share of the best order"),
    "rouge1": ("ROUGE-1", "the share of words in common with the reference, as F1"),
    "rouge2": ("ROUGE-2", "the share of pairs of words in common with the reference, as F1"),
    "rougeL": ("ROUGE-L", "the longest common sequence of words with the reference, as F1"),
    "bleu": ("BLEU, 0 to 100", "the precision of runs of one to four words against the reference"),
}
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
        residuals=_residuals(details.numbers),
        mistakes=[_shown(each) for each in details.mistakes[:MISTAKES]] if texts else [],
        first=FIRST_MISTAKES,
        texts=texts,
        notes=notes,
        parts=(),  # of memory, which the style sheet colours
    )


def headline(version: str, examples: int, metrics: JsonMapping, details: Details) -> str:
    """`news@1 is wrong on 12 of 200 examples`."""
    wrong = len(details.mistakes)
    if details.right_or_wrong:
        return f"{version} is {'right on all' if not wrong else f'wrong on {wrong} of'} {examples} examples"
    shown = ((key, metrics[key]) for key in ("rougeL", "nearness", "loss") if key in metrics)
    name, value = next(shown, ("examples", examples))
    return f"{version}: {name} {_formatted(name, value)} on {examples} examples"


def _numbers(metrics: JsonMapping) -> Iterator[tuple[str, str, str]]:
    """(name, value, what it means) of each metric."""
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            title, says = NAMES.get(name, (name.replace("_", " "), ""))
            if name == "loss" and "accuracy" not in metrics and "mae" in metrics:
                title, says = "loss", "the mean squared error, in deviations of the training values"
            yield title, _formatted(name, value), says


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


def _residuals(numbers: Sequence[tuple[float, float]]) -> str:
    some = numbers[:: max(1, len(numbers) // MOST_DOTS)]
    return agreement(some, x_label="right", y_label="answered") if len(set(some)) > 1 else ""


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
