"""Control: with one adapter per aspect on one base, how often is an output of the requested aspect?

There are two independent judges: a classifier that was trained on the references of the training examples, and ROUGE-L,
which assigns an output to the aspect whose reference is nearest. A rate is a mean over documents and seeds, with an
interval over both. Chance is one in the number of aspects. The classifier's accuracy on the references is the most that
it can detect.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from turret.compare import report_text
from turret.compare.evaluation_page import describe_run, environment
from turret.compare.plots import Mark, rates
from turret.compare.verdict import Interval, interval
from turret.json_types import JsonMapping, JsonObject
from turret.statistics import Floats

MOST_EXAMPLES = 6
MOST_CHARACTERS = 600


@dataclass(frozen=True)
class Written:
    """The texts of one adapter for one aspect, one per document, and the two judges' results."""

    spec: str
    aspect: str
    seed: int
    version: str | None  # None: the bare base
    texts: Sequence[str]
    said: Sequence[str]  # the aspect of each by the classifier
    rouge: Floats  # (N, K): ROUGE-L against the reference of each aspect


@dataclass(frozen=True)
class Rated:
    """One method over all aspects, documents and seeds; rates and ROUGE in points."""

    spec: str
    label: str
    kind: str
    seeds: tuple[int, ...]
    versions: tuple[str, ...]
    by_classifier: Interval
    by_rouge: Interval
    rouge_asked: Interval
    rouge_others: float
    said: tuple[tuple[float, ...], ...]  # share of outputs by requested and classified aspect; rows sum to 1
    nearest: tuple[tuple[float, ...], ...]  # the same by ROUGE


@dataclass(frozen=True)
class Shown:
    """A document with its references and all outputs."""

    document: str
    references: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str, str, str], ...]  # (spec, requested aspect, text, aspect by the classifier)


@dataclass(frozen=True)
class Control:
    """The result of a control experiment."""

    name: str
    base: JsonMapping
    source: str
    aspects: tuple[str, ...]
    documents: int
    train: int
    seeds: tuple[int, ...]
    confidence: float
    chance: float  # points
    judge: JsonMapping  # the classifier: version, base, accuracy on the references of the test documents, training size
    rated: tuple[Rated, ...]
    shown: tuple[Shown, ...]
    failures: Mapping[str, str]
    recipes: Mapping[str, str]
    notes: tuple[str, ...]
    missing: int
    folder: str
    made: JsonMapping  # dates, device and versions of its trainings
    command: str  # that repeats it

    def without_texts(self) -> Control:
        """The result without documents and outputs, for readers who may not see them."""
        return replace(self, shown=(), notes=(*self.notes, "documents and outputs were left out"))

    def as_json(self) -> JsonObject:
        """The content of report.json."""
        return {**asdict(self), "headline": headline(self), "report": f"{self.folder}/report.html"}


def rate_methods(
    written: Sequence[Written],
    aspects: Sequence[str],
    labels: Mapping[str, str],
    kinds: Mapping[str, str],
    seed: int,
) -> tuple[Rated, ...]:
    """The rates of each method, over the seeds with texts for every aspect. Methods without such a seed are left out.

    Args:
        labels: spec -> name of the method.
        kinds: spec -> kind of the method.
        seed: of the intervals.
    """
    methods = []
    for spec in dict.fromkeys(each.spec for each in written):
        by_seed: dict[int, dict[str, Written]] = {}
        for each in written:
            if each.spec == spec:
                by_seed.setdefault(each.seed, {})[each.aspect] = each
        complete = {number: texts for number, texts in by_seed.items() if set(texts) == set(aspects)}
        if complete:
            methods.append(_rate_method(spec, complete, aspects, labels[spec], kinds[spec], seed))
    return tuple(methods)


def _rate_method(
    spec: str, by_seed: Mapping[int, Mapping[str, Written]], aspects: Sequence[str], label: str, kind: str, seed: int
) -> Rated:
    said, near = np.zeros((2, len(aspects), len(aspects)))
    by_classifier, by_rouge, asked, others = [], [], [], []
    for texts in by_seed.values():
        right, nearest, own, rest = [], [], [], []  # (K, N) each
        for row, aspect in enumerate(aspects):
            each = texts[aspect]
            blank = np.array([not text.strip() for text in each.texts])
            given = np.array([[name == word for word in aspects] for name in each.said], dtype=float)  # (N, K)
            given[blank] = 0.0
            closest = shares_of_nearest(each.rouge)
            said[row] += given.mean(0) / len(by_seed)
            near[row] += closest.mean(0) / len(by_seed)
            right.append(given[:, row])
            nearest.append(closest[:, row])
            own.append(each.rouge[:, row])
            rest.append(np.delete(each.rouge, row, axis=1).mean(1))
        by_classifier.append(np.mean(right, axis=0))  # the unit is a document, so average its aspects first
        by_rouge.append(np.mean(nearest, axis=0))
        asked.append(np.mean(own, axis=0))
        others.append(np.mean(rest, axis=0))

    def over(values: Sequence[Floats], what: str) -> Interval:
        rng = np.random.default_rng([seed, zlib.crc32(f"{spec}\n{what}".encode())])
        return interval(np.stack(values), rng, between=(0, 1)).times(100)

    return Rated(
        spec=spec,
        label=label,
        kind=kind,
        seeds=tuple(by_seed),
        versions=tuple(each.version for texts in by_seed.values() for each in texts.values() if each.version),
        by_classifier=over(by_classifier, "classifier"),
        by_rouge=over(by_rouge, "nearest"),
        rouge_asked=over(asked, "rouge"),
        rouge_others=100 * float(np.mean(others)),
        said=_rows(said),
        nearest=_rows(near),
    )


def shares_of_nearest(rouge: Floats) -> Floats:
    """1 for the nearest reference of each text, shared among ties; all 0 if ROUGE is 0. (N, K) -> (N, K)."""
    most = rouge.max(1, keepdims=True)
    best = (rouge >= most - 1e-12) & (most > 0)
    return best / np.maximum(best.sum(1, keepdims=True), 1)


def shown_documents(
    written: Sequence[Written], documents: Sequence[str], references: Mapping[str, Sequence[str]]
) -> tuple[Shown, ...]:
    """A few documents, evenly spread over all, with all outputs of the first seed."""
    first = min((each.seed for each in written), default=0)
    own = [each for each in written if each.seed == first]
    count = min(MOST_EXAMPLES, len(documents))
    examples = []
    for place in [number * len(documents) // count for number in range(count)]:
        wanted = tuple((aspect, _cut(texts[place])) for aspect, texts in references.items())
        outputs = tuple((each.spec, each.aspect, _cut(each.texts[place]), each.said[place]) for each in own)
        examples.append(Shown(_cut(documents[place]), wanted, outputs))
    return tuple(examples)


def _cut(text: str) -> str:
    return report_text.shorten_text(text, MOST_CHARACTERS)


def headline(result: Control) -> str:
    """The result in one sentence."""
    trained = [each for each in result.rated if each.kind != "base"]
    if not trained:
        return "No method has outputs for every aspect yet."
    best = max(trained, key=lambda each: (each.by_classifier.mean, each.by_rouge.mean))
    rate = best.by_classifier
    text = (
        f"{best.label}: {rate.mean:.0f}% of the outputs are of the requested aspect ({rate.low:.0f} to "
        f"{rate.high:.0f}) by a classifier that is right on {result.judge['accuracy']:.0f}% of the references, "
        f"{best.by_rouge.mean:.0f}% by ROUGE; chance is {result.chance:.0f}%"
    )
    return f"{report_text.sentence(text)}{'.' if rate.low > result.chance else ', so control is not shown.'}"


def _rows(matrix: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.round(4).tolist())


# --- control report ---------------------------------------------------------------------------------------------------
# Writes the result of a control experiment as self-contained HTML, Markdown and JSON.


def write_report(result: Control, folder: Path, write: Callable[[Path, str], None]) -> None:
    """Write report.html, report.md and report.json into a folder. write: (path, text), writes one file."""
    write(folder / "report.json", json.dumps(result.as_json(), ensure_ascii=False, indent=1, allow_nan=False))
    write(folder / "report.md", as_markdown(result))
    write(folder / "report.html", as_html(result))


def as_html(result: Control) -> str:
    """The report as one self-contained page."""
    template = environment(True).get_template("control.html.j2")
    return template.render(**_values(result), plot=_plot(result), parts=())  # of memory, which the style sheet colours


def as_markdown(result: Control) -> str:
    """The report as Markdown, without its plot."""
    return environment(False).get_template("control.md.j2").render(**_values(result))


def _values(result: Control) -> JsonObject:
    """The variables of the templates."""
    return {
        "c": result,
        "headline": headline(result),
        "labels": {each.spec: each.label for each in result.rated},
        "made": list(describe_run(result.made)),
    }


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
