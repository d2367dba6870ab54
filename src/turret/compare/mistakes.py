"""What an evaluation found besides its metrics: confusions, calibration, coverage, wrong answers. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from turret.json_types import JsonObject
from turret.tasks.calibration import Bin
from turret.tasks.task import Prediction

SHOWN = 20  # wrong answers in the JSON of an evaluation
Z = 1.959964  # of a 95% interval


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, or an output that is not its reference.

    Args:
        row: the line (of a text file) or the number of its row.
        text: the input.
        right: the label, the labels or the reference.
        given: the answer.
        score: from 0 to 1.
        confidence: of a classifier, the probability of the answer; with several labels, that of the most confident
            wrong decision.
    """

    row: int
    text: str
    right: Prediction
    given: Prediction
    score: float
    confidence: float | None


@dataclass(frozen=True)
class Reliability:
    """How well probabilities and frequencies agree.

    Args:
        ece: the expected calibration error of the answers.
        raw_ece: the same without the temperature; None if the version has none.
        temperature: of the version.
        calibrated_on: number of validation examples of the version's calibration.
    """

    ece: float
    bins: tuple[Bin, ...]
    raw_ece: float | None = None
    temperature: float | None = None
    calibrated_on: int | None = None


@dataclass(frozen=True)
class Coverage:
    """How often the sets of a stated coverage held the right label here."""

    coverage: float  # stated
    measured: float
    low: float  # 95% interval of the measured one
    high: float
    mean_size: float  # labels in a set


@dataclass(frozen=True)
class Confusions:
    """How often each class (row) was answered with each class (column)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def pairs(self, most: int) -> list[tuple[str, str, int]]:
        """The most frequent confusions: (right, given, count)."""
        found = [
            (right, given, self.counts[row][column])
            for row, right in enumerate(self.labels)
            for column, given in enumerate(self.labels)
            if row != column and self.counts[row][column]
        ]
        return sorted(found, key=lambda each: -each[2])[:most]


@dataclass(frozen=True)
class Details:
    """The details of one evaluation. What a task does not have is None.

    Args:
        mistakes: the most confident first, or the worst first if answers have no probability.
        right_or_wrong: whether every score is 0 or 1.
    """

    mistakes: tuple[Mistake, ...]
    right_or_wrong: bool
    confusion: Confusions | None = None
    reliability: Reliability | None = None
    coverage: Coverage | None = None

    def as_json(self) -> JsonObject:
        """The details with the first `SHOWN` mistakes, and the number of all."""
        return {
            "confusion": None if self.confusion is None else asdict(self.confusion),
            "reliability": None if self.reliability is None else asdict(self.reliability),
            "coverage": None if self.coverage is None else asdict(self.coverage),
            "wrong": len(self.mistakes),
            "mistakes": [asdict(each) for each in self.mistakes[:SHOWN]],
        }


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` trials. Source: Wilson 1927, Probable Inference."""
    if not count:
        return 0.0, 1.0
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def covered(coverage: float, sets: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Coverage:
    """Count how often all right labels are in the set."""
    held = [set(labels) <= set(found) for found, labels in zip(sets, right, strict=True)]
    share = sum(held) / len(held)
    size = sum(map(len, sets)) / len(sets)
    return Coverage(coverage, share, *wilson(share, len(held)), size)
