"""Details of a comparison: differences by class, confusions, and single examples."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from turret.compare.evidence import Interval, interval
from turret.compare.report_text import shortened
from turret.compare.results import CellResult, Output
from turret.data import Dataset, Example

MOST_CLASSES = 30
MOST_EXAMPLES = 12
SOME_EXAMPLES = 6
MOST_CHARACTERS = 400


@dataclass(frozen=True)
class PerClass:
    """The share of a class's examples that a row gets right, and its difference from the baseline."""

    label: str
    spec: str
    examples: int
    right: float  # points
    difference: Interval  # points


@dataclass(frozen=True)
class Confusion:
    """Counts by true class and answer, means over seeds."""

    spec: str
    labels: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Disagreement:
    """A test example with every method's answer."""

    text: str
    wanted: str
    answers: tuple[tuple[str, str, float], ...]  # (spec, most common answer, mean score over seeds)


def per_class(
    results: Sequence[CellResult], baseline: Mapping[int, CellResult], data: Dataset, confidence: float, seed: int
) -> tuple[PerClass, ...]:
    """The most common classes, for each row but the baseline and the bare base.

    Args:
        baseline: its results by seed.
        seed: of the intervals.
    """
    true = np.array([example.output for example in data.test])
    counts = Counter(true.tolist())
    classes = []
    for label in [label for label, _ in counts.most_common(MOST_CLASSES)]:
        places = np.flatnonzero(true == label)
        for spec in dict.fromkeys(each.spec for each in results):
            own = {each.seed: each for each in results if each.spec == spec and each.spec != "base"}
            seeds = sorted(own.keys() & baseline.keys())
            if not seeds or any(own[each] is baseline[each] for each in seeds):
                continue
            d = np.stack([own[each].scores[places] - baseline[each].scores[places] for each in seeds])
            rng = np.random.default_rng([seed, zlib.crc32(f"{spec}\n{label}".encode())])
            right = 100 * float(np.mean([own[each].scores[places].mean() for each in seeds]))
            difference = interval(d, rng, confidence=confidence, resamples=2000).times(100)
            classes.append(PerClass(str(label), spec, len(places), right, difference))
    return tuple(classes)


def confusion(
    results: Sequence[CellResult], data: Dataset, labels: Sequence[str], specs: Sequence[str]
) -> tuple[Confusion, ...]:
    """The confusions of each row; none if there are too many classes to read."""
    if len(labels) > MOST_CLASSES:
        return ()
    place = {label: number for number, label in enumerate(labels)}
    matrices = []
    for spec in specs:
        own = [each for each in results if each.spec == spec]
        counts = np.zeros((len(labels), len(labels)))
        for each in own:
            for example, answer in zip(data.test, each.answers, strict=True):
                counts[place[str(example.output)], place[str(answer)]] += 1 / len(own)
        matrices.append(Confusion(spec, tuple(labels), tuple(tuple(row) for row in counts.round(2).tolist())))
    return tuple(matrices)


def disagreements(results: Sequence[CellResult], data: Dataset, specs: Sequence[str]) -> tuple[Disagreement, ...]:
    """The test examples on which the rows differ most, without the bare base."""
    rows = _answering(results, specs)
    if len(rows) < 2:
        return ()
    means = np.stack([np.mean([each.scores for each in own], axis=0) for own in rows.values()])  # (rows, N)
    spread = means.max(0) - means.min(0)
    places = [int(place) for place in np.argsort(-spread, kind="stable")[:MOST_EXAMPLES] if spread[place] > 0]
    return tuple(_answered(rows, data.test, place) for place in places)


def some_examples(results: Sequence[CellResult], data: Dataset, specs: Sequence[str]) -> tuple[Disagreement, ...]:
    """A few test examples, evenly spread over all."""
    rows, count = _answering(results, specs), min(SOME_EXAMPLES, len(data.test))
    return (
        tuple(_answered(rows, data.test, number * len(data.test) // count) for number in range(count)) if rows else ()
    )


def _answering(results: Sequence[CellResult], specs: Sequence[str]) -> dict[str, list[CellResult]]:
    """The results of each row but the bare base."""
    rows = {spec: [each for each in results if each.spec == spec and each.spec != "base"] for spec in specs}
    return {spec: own for spec, own in rows.items() if own}


def _answered(rows: Mapping[str, Sequence[CellResult]], examples: Sequence[Example], place: int) -> Disagreement:
    answers = tuple(
        (spec, _commonest([each.answers[place] for each in own]), float(np.mean([each.scores[place] for each in own])))
        for spec, own in rows.items()
    )
    example = examples[place]
    text, wanted = (shortened(each, MOST_CHARACTERS) for each in (example.input, _joined(example.output)))
    return Disagreement(text, wanted, answers)


def _joined(output: Output) -> str:
    return output if isinstance(output, str) else ", ".join(output)


def _commonest(answers: Sequence[Output]) -> str:
    return shortened(Counter(map(_joined, answers)).most_common(1)[0][0], MOST_CHARACTERS)
