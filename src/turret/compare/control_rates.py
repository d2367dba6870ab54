"""Control: one base, an adapter an aspect, and how often an output is of the aspect that was asked for.

Two judges that know nothing of each other: a classifier that learnt the aspects from the references of the training
examples, and ROUGE-L against the reference of every aspect, of which the nearest counts. A rate is a mean over
documents and seeds, with an interval over both. Chance is one in the number of aspects; what the classifier makes of
the references themselves is as much as it can say. Refuses to know how texts are made and where they are kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from turret.compare import report_text
from turret.compare.evidence import Array, Interval, interval

MOST_EXAMPLES = 6
MOST_CHARACTERS = 600


@dataclass(frozen=True)
class Written:
    """What one adapter wrote for one aspect, a text a document, and how both judges see it."""

    spec: str
    aspect: str
    seed: int
    version: str | None  # None: the bare base
    texts: Sequence[str]
    said: Sequence[str]  # the aspect that the classifier sees in each
    rouge: Array  # (N, K): ROUGE-L against the reference of every aspect, in their order


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
    said: tuple[tuple[float, ...], ...]  # share of outputs, asked by said: rows sum to 1
    nearest: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Shown:
    """A document with what one method wrote for every aspect, and the references."""

    document: str
    references: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str, str, str], ...]  # (spec, asked, text, said)


@dataclass(frozen=True)
class Control:
    """The whole finding."""

    name: str
    base: Mapping[str, Any]
    source: str
    aspects: tuple[str, ...]
    documents: int
    train: int
    seeds: tuple[int, ...]
    confidence: float
    chance: float  # points
    judge: Mapping[str, Any]  # version, base, accuracy on the references of the test documents, how many it learnt from
    rated: tuple[Rated, ...]
    shown: tuple[Shown, ...]
    failures: Mapping[str, str]
    recipes: Mapping[str, str]
    notes: tuple[str, ...]
    missing: int
    folder: str
    made: Mapping[str, Any]  # when, where and with what its trainings were made
    command: str  # that makes it again

    def without_texts(self) -> Control:
        """The same for those who may not read the documents: they and what was written of them are left out."""
        return replace(self, shown=(), notes=(*self.notes, "documents and outputs were left out"))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "headline": headline(self), "report": f"{self.folder}/report.html"}


def rated(
    written: Sequence[Written], aspects: Sequence[str], labels: Mapping[str, str], kinds: Mapping[str, str], seed: int,
    confidence: float = 0.95,
) -> tuple[Rated, ...]:  # fmt: skip
    """Every method of which each aspect was written under a seed; others are left out."""
    found = []
    for spec in dict.fromkeys(each.spec for each in written):
        own: dict[int, dict[str, Written]] = {}
        for each in written:
            if each.spec == spec:
                own.setdefault(each.seed, {})[each.aspect] = each
        whole = {number: some for number, some in own.items() if set(some) == set(aspects)}
        if whole:
            found.append(_rated(spec, whole, aspects, labels[spec], kinds[spec], seed, confidence))
    return tuple(found)


def _rated(
    spec: str, whole: Mapping[int, Mapping[str, Written]], aspects: Sequence[str], label: str, kind: str, seed: int,
    confidence: float,
) -> Rated:  # fmt: skip
    said, near = np.zeros((2, len(aspects), len(aspects)))
    by_classifier, by_rouge, asked, others = [], [], [], []
    for some in whole.values():
        right, nearest, own, rest = [], [], [], []  # (K, N) each
        for row, aspect in enumerate(aspects):
            each = some[aspect]
            blank = np.array([not text.strip() for text in each.texts])
            given = np.array([[name == word for word in aspects] for name in each.said], dtype=float)  # (N, K)
            given[blank] = 0.0
            closest = shares_of_nearest(each.rouge)
            said[row] += given.mean(0) / len(whole)
            near[row] += closest.mean(0) / len(whole)
            right.append(given[:, row])
            nearest.append(closest[:, row])
            own.append(each.rouge[:, row])
            rest.append(np.delete(each.rouge, row, axis=1).mean(1))
        by_classifier.append(np.mean(right, axis=0))  # a document is a unit, its aspects belong together
        by_rouge.append(np.mean(nearest, axis=0))
        asked.append(np.mean(own, axis=0))
        others.append(np.mean(rest, axis=0))

    def over(values: Sequence[Array], what: str) -> Interval:
        rng = np.random.default_rng([seed, zlib.crc32(f"{spec}\n{what}".encode())])
        return interval(np.stack(values), rng, confidence=confidence, between=(0, 1)).times(100)

    return Rated(
        spec=spec,
        label=label,
        kind=kind,
        seeds=tuple(whole),
        versions=tuple(each.version for some in whole.values() for each in some.values() if each.version),
        by_classifier=over(by_classifier, "classifier"),
        by_rouge=over(by_rouge, "nearest"),
        rouge_asked=over(asked, "rouge"),
        rouge_others=100 * float(np.mean(others)),
        said=_rows(said),
        nearest=_rows(near),
    )


def shares_of_nearest(rouge: Array) -> Array:
    """Which reference is nearest to each text, shared among equals; none where it is like none. (N, K) -> (N, K)."""
    most = rouge.max(1, keepdims=True)
    best = (rouge >= most - 1e-12) & (most > 0)
    shares: Array = best / np.maximum(best.sum(1, keepdims=True), 1)
    return shares


def shown(
    written: Sequence[Written], documents: Sequence[str], references: Mapping[str, Sequence[str]]
) -> tuple[Shown, ...]:
    """A few documents, evenly over all, with everything that the first seed wrote for them."""
    first = min((each.seed for each in written), default=0)
    own = [each for each in written if each.seed == first]
    count = min(MOST_EXAMPLES, len(documents))
    found = []
    for place in [number * len(documents) // count for number in range(count)]:
        wanted = tuple((aspect, _short(texts[place])) for aspect, texts in references.items())
        outputs = tuple((each.spec, each.aspect, _short(each.texts[place]), each.said[place]) for each in own)
        found.append(Shown(_short(documents[place]), wanted, outputs))
    return tuple(found)


def headline(found: Control) -> str:
    """The answer in one sentence."""
    trained = [each for each in found.rated if each.kind != "base"]
    if not trained:
        return "No method has written for every aspect yet."
    best = max(trained, key=lambda each: (each.by_classifier.mean, each.by_rouge.mean))
    rate = best.by_classifier
    sure = rate.low > found.chance
    said = (
        f"{best.label}: {rate.mean:.0f}% of the outputs are of the asked aspect ({rate.low:.0f} to {rate.high:.0f}) by "
        f"a classifier that is right on {found.judge['accuracy']:.0f}% of the references, {best.by_rouge.mean:.0f}% by "
        f"ROUGE; chance is {found.chance:.0f}%"
    )
    return f"{report_text.sentence(said)}{'.' if sure else ', so control is not shown.'}"


def _rows(matrix: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.round(4).tolist())


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"
