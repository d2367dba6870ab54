"""The result of one training of a comparison, as its process wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from turret.data import Input
from turret.json_types import JsonMapping, JsonObject, Plain
from turret.tasks import Mistake, QuestionType
from turret.tasks.calibration import Bin, Decided, Sureness

if TYPE_CHECKING:
    from turret.compare.design import Cell
    from turret.statistics import Floats

# --- mistakes ---------------------------------------------------------------------------------------------------------
# What an evaluation found besides its metrics: confusions, calibration, coverage, wrong answers. Loads no torch.


SHOWN = 20  # wrong answers in the JSON of an evaluation
MISTAKES = 60  # on the page of an evaluation, and in the report of a run
MOST_DOTS = 400  # of a plot of numbers
KEPT_TEXT = 4000  # characters of a text in the report of a run
Z = 1.959964  # of a 95% interval


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
        mistakes: the worst first.
        task: the kind, which says what a mistake is.
        reliability: by question; the question is "" where there is only one.
        numbers: what is right and what was answered, of each example whose answer is a number.
    """

    mistakes: tuple[Mistake, ...]
    task: str
    confusion: Confusions | None = None
    reliability: Mapping[str, Reliability] = field(default_factory=dict)
    coverage: Coverage | None = None
    numbers: tuple[tuple[float, float], ...] = ()

    def as_json(self) -> JsonObject:
        """The details with the first `SHOWN` mistakes, and the number of all.

        `reliability` is one object, or one by question.
        """
        sure = {question: asdict(each) for question, each in self.reliability.items()}
        return {
            "confusion": None if self.confusion is None else asdict(self.confusion),
            "reliability": sure.get("", sure or None),
            "coverage": None if self.coverage is None else asdict(self.coverage),
            "wrong": len(self.mistakes),
            "mistakes": [each.as_json() for each in self.mistakes[:SHOWN]],
        }


@dataclass(frozen=True)
class RunReport:
    """What a training's version got right and wrong on its held-out examples. It is kept with the run, as JSON.

    Args:
        split: `test`, or `validation` where there is no test split.
        wrong: number of all wrong answers; `details` has the worst.
    """

    split: str
    examples: int
    wrong: int
    details: Details

    @classmethod
    def of(cls, split: str, examples: int, details: Details) -> RunReport:
        """A report that stays small: the worst mistakes, with the beginning of long texts."""
        mistakes = tuple(replace(each, asked=_beginning(each.asked)) for each in details.mistakes[:MISTAKES])
        kept = replace(details, mistakes=mistakes, numbers=tuple(spread_out(details.numbers)))
        return cls(split, examples, len(details.mistakes), kept)

    @classmethod
    def from_json(cls, content: str | bytes) -> RunReport:
        """The report that `to_json` wrote."""
        return _in_json().validate_json(content)

    def to_json(self) -> str:
        """All of it, for `from_json`."""
        return _in_json().dump_json(self).decode()


@cache
def _in_json() -> TypeAdapter[RunReport]:
    return TypeAdapter(RunReport)


def spread_out(numbers: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """About `MOST_DOTS` of them, evenly spaced."""
    return numbers[:: max(1, len(numbers) // MOST_DOTS)]


def _beginning(asked: Input) -> Input:
    return asked if len(str(asked)) <= KEPT_TEXT else f"{str(asked)[: KEPT_TEXT - 1]}…"


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` trials. Source: Wilson 1927, Probable Inference."""
    if not count:
        return 0.0, 1.0
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def measure_coverage(coverage: float, sets: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Coverage:
    """Count how often all right labels are in the set."""
    held = [set(labels) <= set(found) for found, labels in zip(sets, right, strict=True)]
    share = sum(held) / len(held)
    size = sum(map(len, sets)) / len(sets)
    return Coverage(coverage, share, *wilson(share, len(held)), size)


def error_interval(decided: Decided) -> tuple[float, float]:
    """The 95% interval of the share of the decided answers that is wrong."""
    return wilson(decided.error or 0.0, decided.count)


@dataclass(frozen=True)
class QuestionResult:
    """One question of a panel, measured on labelled examples.

    Args:
        column: of the data, with the right answers.
        examples: how many of them have an answer.
        metrics: of the question alone, as its task measures it.
        threshold: the least probability of an answer that is decided; None: every answer is.
        threshold_of: whose threshold it is: the question's own, or that of the version's promise.
        bound: the share of the decided answers that the promise lets be wrong; None without such a promise.
        sureness: of its answers.
    """

    question: str
    version: str
    digest: str
    column: str
    type: QuestionType
    examples: int
    metrics: JsonMapping
    threshold: float | None
    threshold_of: Literal["question", "promise"] | None
    bound: float | None
    sureness: Sureness
    details: Details

    @property
    def decided(self) -> Decided:
        """What the threshold decides."""
        return self.sureness.at(self.threshold)

    @property
    def share(self) -> float:
        """Of the answers that are decided."""
        return self.decided.count / self.examples

    def as_json(self) -> JsonObject:
        """The fields, and what is decided with the 95% interval of the error."""
        decided = self.decided
        low, high = error_interval(decided)
        found = {key: value for key, value in vars(self).items() if key not in ("sureness", "details")}
        return found | {
            "decided": {
                "answers": decided.count,
                "share": self.share,
                "wrong": decided.wrong,
                "error": decided.error,
                "low": low,
                "high": high,
            },
            "curve": [asdict(each) for each in self.sureness.curve],
            "details": self.details.as_json(),
        }


# --- results ----------------------------------------------------------------------------------------------------------


Output = str | Sequence[str]  # a text, a label, or the labels of a multi-label task


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One cell that has run."""

    spec: str
    seed: int
    fraction: float
    recipe: str  # TOML
    kind: str  # of the task
    version: str | None  # None: the bare base
    digest: str | None = None
    run: str | None = None
    base: JsonMapping  # id, fingerprint
    lr: float | None = None
    metrics: JsonMapping  # on the test examples
    held: JsonMapping  # split -> metrics, as they were stored with the version
    answers: Sequence[Output]  # for each test example
    scores: Floats  # (N,): right or wrong, or ROUGE-L
    parameters: Mapping[str, int]
    timing: Mapping[str, float] = field(default_factory=dict)  # empty: nothing was trained
    memory: JsonMapping = field(default_factory=dict)
    bundle_bytes: int
    latency: Mapping[str, float]
    forgetting: Mapping[str, float] | None
    best: JsonMapping | None = None  # the best evaluation during training
    wall_seconds: float
    resident: bool = False  # whether it ran beside others on a base in memory: its time and memory are not reported
    notes: Sequence[str]
    losses: Sequence[float] = ()  # of training, means over equal stretches
    guess: float | None = None  # mean score of outputs against the references of other texts
    said: str = ""  # how a row that trains nothing answers, in one sentence
    warnings: Sequence[str] = ()  # of the training, a sentence each: why not to trust its version
    made: JsonMapping | None = None  # date, device, threads, precision, versions

    @classmethod
    def of(cls, cell: Cell, written: Mapping[str, Plain]) -> CellResult:
        """The result of a cell, from the JSON that its process wrote."""
        import numpy as np

        known = {each.name for each in fields(cls)}
        values: JsonObject = {name: value for name, value in written.items() if name in known}
        values |= {"spec": cell.candidate.spec, "seed": cell.seed, "fraction": cell.fraction}
        values |= {"recipe": cell.recipe.to_toml(), "held": written.get("stored_metrics", {})}
        return cls(**values | {"scores": np.asarray(written["scores"], dtype=float)})


def made_with(results: Iterable[CellResult]) -> JsonObject:
    """Dates (`from`, `to`), device and versions of the trainings; a list of values if they differ."""
    records = [each.made for each in results if each.made]
    if not records:
        return {}
    dates = sorted(str(each["date"]) for each in records)
    summary: JsonObject = {"from": dates[0], "to": dates[-1]}
    for key in records[0]:
        if key != "date":
            values = {repr(each.get(key)): each.get(key) for each in records}
            summary[key] = list(values.values()) if len(values) > 1 else records[0][key]
    return summary


# --- costs ------------------------------------------------------------------------------------------------------------
# The measured costs of a method: weights, memory, time, size and forgetting. Memory and time are of the first seed.


@dataclass(frozen=True)
class MeanRange:
    """A mean over seeds with its smallest and largest value."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> MeanRange | None:
        """The span of some values; None if there are none."""
        values = list(values)
        return cls(fmean(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Costs:
    """The costs of one row. Memory and time are of its first seed, which had a process of its own."""

    trainable: int
    total: int
    bundle_bytes: int
    above_base: MeanRange | None  # peak bytes of the process above the loaded base; None: nothing is trained
    peak: MeanRange | None  # bytes of the whole process
    predicted: Mapping[str, int] | None  # bytes by component, by the preflight
    measured: Mapping[str, int] | None  # bytes by component
    train_seconds: MeanRange | None
    best_seconds: MeanRange | None  # until the best evaluation during training
    best_split: str | None  # of that evaluation
    answer_seconds: MeanRange | None  # one answer to one text
    forgetting: MeanRange | None  # increase of the base's loss on neutral text
    forgetting_low: float | None = None  # the ends of its 95% interval over texts, means over seeds
    forgetting_high: float | None = None

    @property
    def forgot(self) -> str:
        """`+0.031 (+0.012 to +0.050)`: the increase of the base's loss on neutral text; "–" if it is not measured."""
        if self.forgetting is None:
            return "–"
        if self.forgetting_low is None or self.forgetting_high is None:
            return f"{self.forgetting.mean:+.3f}"
        return f"{self.forgetting.mean:+.3f} ({self.forgetting_low:+.3f} to {self.forgetting_high:+.3f})"

    @property
    def share(self) -> float:
        """The share of the base's weights that are trained."""
        return self.trainable / max(1, self.total)


def costs_of(own: Sequence[CellResult]) -> Costs:
    """The costs of one row from all its results."""
    first, timed = own[0], [each for each in own if not each.resident][:1]
    trained = [each for each in timed if each.timing]
    forgot = [each.forgetting for each in own if each.forgetting]
    ends = [(each["low"], each["high"]) for each in forgot if "low" in each]
    best = [each.best for each in timed if each.best]
    measured = [each.memory["measured"] for each in trained if each.memory]
    predicted = [each.memory["predicted"] for each in trained if each.memory.get("predicted")]
    return Costs(
        trainable=first.parameters["trainable"],
        total=first.parameters["total"],
        bundle_bytes=round(fmean(each.bundle_bytes for each in own)),
        above_base=MeanRange.of(each.memory["above_base_bytes"] for each in trained if each.memory),
        peak=MeanRange.of(each.memory["peak_bytes"] for each in trained if each.memory),
        predicted=_means(predicted),
        measured=_means(measured),
        train_seconds=MeanRange.of(each.timing["train_seconds"] for each in trained),
        best_seconds=MeanRange.of(each["seconds"] for each in best),
        best_split=best[0]["split"] if best else None,
        answer_seconds=MeanRange.of(each.latency["median_seconds"] for each in timed),
        forgetting=MeanRange.of(each["loss"] - each["base_loss"] for each in forgot),
        forgetting_low=fmean(low for low, _ in ends) if ends else None,
        forgetting_high=fmean(high for _, high in ends) if ends else None,
    )


def _means(parts: Sequence[Mapping[str, int]]) -> dict[str, int] | None:
    if not parts:
        return None
    return {name: round(fmean(part[name] for part in parts)) for name in parts[0]}
