"""Where the difference lies: per class, in what is taken for what, and in single examples. Knows answers and labels."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turret.compare.evidence import Interval, interval
from turret.compare.results import Result

MOST_CLASSES = 30
MOST_EXAMPLES = 12
SOME_EXAMPLES = 6
MOST_CHARACTERS = 400


@dataclass(frozen=True)
class PerClass:
    """How much more of a class's examples a row gets right than the yardstick, in points."""

    label: str
    spec: str
    examples: int
    right: float  # points, of this row
    difference: Interval


@dataclass(frozen=True)
class Confusion:
    """counts[true][given], means over seeds."""

    spec: str
    labels: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Disagreement:
    """A test example with every method's answer to it."""

    text: str
    wanted: str
    answers: tuple[tuple[str, str, float], ...]  # (spec, its commonest answer, mean score over seeds)


def per_class(
    whole: Sequence[Result],
    yardstick: Mapping[int, Result],
    data: Any,
    labels: Sequence[str],
    confidence: float,
    seed: int,
) -> tuple[PerClass, ...]:
    """Of the commonest classes, every row but the yardstick and the base."""
    wanted = np.array([example.label for example in data.test])
    counts = Counter(wanted.tolist())
    found = []
    for label in [label for label, _ in counts.most_common(MOST_CLASSES)]:
        places = np.flatnonzero(wanted == label)
        for spec in dict.fromkeys(each.spec for each in whole):
            own = {each.seed: each for each in whole if each.spec == spec and each.version is not None}
            seeds = sorted(own.keys() & yardstick.keys())
            if not seeds or any(own[each] is yardstick[each] for each in seeds):
                continue
            d = np.stack([own[each].scores[places] - yardstick[each].scores[places] for each in seeds])
            rng = np.random.default_rng([seed, zlib.crc32(f"{spec}\n{label}".encode())])
            right = 100 * float(np.mean([own[each].scores[places].mean() for each in seeds]))
            apart = interval(d, rng, confidence=confidence, resamples=2000).times(100)
            found.append(PerClass(str(label), spec, len(places), right, apart))
    return tuple(found)


def confusion(whole: Sequence[Result], data: Any, labels: Sequence[str], specs: Sequence[str]) -> tuple[Confusion, ...]:
    """What each row takes each class for; nothing where the classes are too many to be read."""
    if len(labels) > MOST_CLASSES:
        return ()
    place = {label: number for number, label in enumerate(labels)}
    found = []
    for spec in specs:
        own = [each for each in whole if each.spec == spec]
        counts = np.zeros((len(labels), len(labels)))
        for each in own:
            for example, given in zip(data.test, each.answers, strict=True):
                counts[place[example.label], place[given]] += 1 / len(own)
        found.append(Confusion(spec, tuple(labels), tuple(tuple(row) for row in counts.round(2).tolist())))
    return tuple(found)


def disagreements(whole: Sequence[Result], data: Any, specs: Sequence[str]) -> tuple[Disagreement, ...]:
    """The test examples on which the trained rows differ most."""
    rows = _trained(whole, specs)
    if len(rows) < 2:
        return ()
    means = np.stack([np.mean([each.scores for each in own], axis=0) for own in rows.values()])  # (rows, N)
    apart = means.max(0) - means.min(0)
    places = [int(place) for place in np.argsort(-apart, kind="stable")[:MOST_EXAMPLES] if apart[place] > 0]
    return tuple(_answered(rows, data.test, place) for place in places)


def some_examples(whole: Sequence[Result], data: Any, specs: Sequence[str]) -> tuple[Disagreement, ...]:
    """A few test examples, evenly over all, whatever was answered."""
    rows, count = _trained(whole, specs), min(SOME_EXAMPLES, len(data.test))
    return (
        tuple(_answered(rows, data.test, number * len(data.test) // count) for number in range(count)) if rows else ()
    )


def _trained(whole: Sequence[Result], specs: Sequence[str]) -> dict[str, list[Result]]:
    """The trainings of each row that has any."""
    rows = {spec: [each for each in whole if each.spec == spec and each.version is not None] for spec in specs}
    return {spec: own for spec, own in rows.items() if own}


def _answered(rows: Mapping[str, Sequence[Result]], examples: Sequence[Any], place: int) -> Disagreement:
    answers = tuple(
        (spec, _commonest([each.answers[place] for each in own]), float(np.mean([each.scores[place] for each in own])))
        for spec, own in rows.items()
    )
    return Disagreement(_short(examples[place].input), _short(_words(examples[place].output)), answers)


def _words(output: str | Sequence[str]) -> str:
    return output if isinstance(output, str) else ", ".join(output)


def _commonest(answers: Sequence[Any]) -> str:
    return _short(Counter(map(_words, answers)).most_common(1)[0][0])


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"
