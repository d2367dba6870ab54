"""Calibration of a classifier: its error, a temperature for its probabilities, and sets of labels with a coverage.

Each of several questions on a text has a calibration of its own. Words of a text share one; a text counts once.

Temperature and sets are fitted on validation examples, which no weight was trained on, and are stored with the task.

Temperature. The probabilities are `softmax(z / T)`; T has the lowest loss on the validation examples. Each target gives
one part in n + 1 to the uniform distribution, so T stays above 0 if all answers are right. T is 1, and changes nothing,
with fewer than `FEWEST_TEMPERATURE` examples, or if the likelihood ratio `2 n (loss(1) - loss(T))` is below `EVIDENT`:
few examples give a T that makes probabilities worse about as often as better.
Source: Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2; the smoothed targets are Platt's (1999).

Sets of labels. The score of a label is `-log p` without the temperature. A set holds all labels whose score is at most
the k-th smallest score of the right labels, `k = ceil((n + 1) * coverage)`. If new texts come from where the validation
examples came from, the right label is in the set with at least that probability, whatever the model.
Source: split conformal prediction, as in Romano, Sesia and Candes 2020, Classification with Valid and Adaptive
Coverage; the score is that of Sadinle, Lei and Wasserman 2019, Least Ambiguous Set-Valued Classifiers, which rises with
p as `-log p` falls.

Error. ECE, the expected calibration error, is the mean over examples of |accuracy - confidence| of their bin.
Source: Naeini et al. 2015, Obtaining Well Calibrated Probabilities Using Bayesian Binning; Guo et al. 2017, equation 3.

Deciding. An answer is decided if its probability is at least a threshold. A lower threshold decides more answers, and
more of them are wrong: `error_by_share` has this curve, and `Sureness` what can be drawn without the answers.

Axes: B examples, C classes, N answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turret.errors import AdapterError, DataError
from turret.json_types import JsonMapping, Plain
from turret.tasks.shapes import CalibrationSpec, SurenessSpec

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeIs

FEWEST = 20  # validation examples; with fewer nothing is fitted
FEWEST_TEMPERATURE = 50  # with fewer the temperature is 1
EVIDENT = 3.84  # the 95% quantile of chi-squared with one degree of freedom
MOST_SCORES = 500  # that are stored; of more examples, evenly spaced ranks
HOTTEST = 20.0  # T is between 1 / HOTTEST and HOTTEST
BINS = 15  # of confidence, equally wide, as in Guo et al. 2017
MOST_POINTS = 100  # of the error by the share that is decided
KEYS = {"temperature", "examples", "scores", "chose_weights"}


@dataclass(frozen=True)
class Calibration:
    """What was fitted on validation examples.

    Args:
        temperature: T, which the logits are divided by.
        examples: number of validation examples, n.
        scores: the scores of their right labels, rising; all of them, or every (n / MOST_SCORES)-th.
        chose_weights: whether the same examples also chose the weights (`train.keep = "best"`).
    """

    temperature: float
    examples: int
    scores: tuple[float, ...]
    chose_weights: bool = False

    def threshold(self, coverage: float) -> float:
        """The largest score of a label in a set. Raises DataError if the examples are too few for this coverage."""
        check_coverage(coverage)
        n, kept = self.examples, len(self.scores)
        rank = math.ceil((n + 1) * coverage - 1e-9)
        if rank > n:
            needed = math.ceil(coverage / (1 - coverage) - 1e-9)
            most = math.floor(1000 * n / (n + 1)) / 1000
            raise DataError(
                f"coverage {coverage:g} needs {needed} validation examples or more, and this version was calibrated on "
                f"{n}: ask for {most:g} or less"
            )
        return self.scores[math.ceil(rank * kept / n) - 1]  # of those that are kept, the first of at least this rank

    def to_json(self) -> CalibrationSpec:
        return {
            "temperature": self.temperature,
            "examples": self.examples,
            "scores": list(self.scores),
            "chose_weights": self.chose_weights,
        }

    @classmethod
    def from_json(cls, value: CalibrationSpec | dict[str, CalibrationSpec]) -> Calibration:
        """The calibration in a manifest. Raises AdapterError for values that no training writes."""
        if not isinstance(value, dict) or set(value) != KEYS:
            raise _unreadable("its keys are not known")
        given: JsonMapping = value
        temperature, examples, scores = given["temperature"], given["examples"], given["scores"]
        if not _is_number(temperature) or not 0 < temperature < 1e6:
            raise _unreadable("its temperature is not a positive number")
        if not isinstance(scores, list) or not scores or not all(_is_number(each) and each >= 0 for each in scores):
            raise _unreadable("its scores are not a list of numbers from 0")
        if scores != sorted(scores) or type(examples) is not int or not len(scores) <= examples < 1 << 40:
            raise _unreadable("its scores do not rise, or are more than its examples")
        if not isinstance(given["chose_weights"], bool):
            raise _unreadable("chose_weights is not true or false")
        return cls(float(temperature), examples, tuple(map(float, scores)), given["chose_weights"])


def check_coverage(coverage: float) -> None:
    """Raise DataError unless it is above 0 and below 1."""
    if isinstance(coverage, bool) or not 0 < coverage < 1:
        raise DataError(f"coverage {coverage:g}: expected a number above 0 and below 1, such as 0.9")


def require_calibration(calibration: Calibration | None, version: str) -> Calibration:
    """The calibration of a version. Raises AdapterError if it has none."""
    if calibration is None:
        raise AdapterError(
            f"{version} has no calibration, which a coverage needs: train it again with a validation split of at least "
            f"{FEWEST} examples, such as data.validation = 0.1"
        )
    return calibration


def fit(
    logits: Tensor,
    targets: Tensor,
    *,
    multi_label: bool = False,
    chose_weights: bool = False,
    rows: Sequence[int] | None = None,
) -> Calibration:
    """The temperature and the scores of some validation examples.

    Args:
        logits: (B, C).
        targets: class numbers (B,) int64; with `multi_label` ones and zeros (B, C).
        chose_weights: whether the same examples chose the weights.
        rows: how many rows each example has, such as the words of a text, whose answers are alike; None: one.
    """
    import torch

    z = logits.detach().double().cpu()
    y = targets.double().cpu() if multi_label else torch.nn.functional.one_hot(targets.cpu(), z.shape[1]).double()
    temperature = _temperature(_binary_slope(z, y) if multi_label else _slope(z, y))
    every = scores(z, multi_label=multi_label)  # (B, C)
    right = torch.where(y > 0, every, torch.zeros_like(every)).amax(1)  # (B,)
    parts = torch.split(right, 1 if rows is None else [count for count in rows if count])
    worst = [float(part.max()) for part in parts]  # all right labels of an example are in the set
    evidence = len(worst) * _gain(z, y, temperature, multi_label=multi_label)
    if len(worst) < FEWEST_TEMPERATURE or evidence < EVIDENT:
        temperature = 1.0
    rising = sorted(math.ceil(1e6 * score) / 1e6 for score in worst)  # rounded up, so sets only grow
    n, kept = len(rising), min(len(rising), MOST_SCORES)
    order = [rising[math.ceil((place + 1) * n / kept) - 1] for place in range(kept)]
    return Calibration(float(f"{temperature:.6g}"), n, tuple(order), chose_weights)


def scores(logits: Tensor, *, multi_label: bool) -> Tensor:
    """`-log p` of every label, in float64: (B, C)."""
    z = logits.detach().double()
    return -z.sigmoid().clamp_min(1e-300).log() if multi_label else -z.log_softmax(-1)


def label_sets(
    logits: Tensor, labels: Sequence[str], predicted: Sequence[Sequence[str]], threshold: float, *, multi_label: bool
) -> list[list[str]]:
    """The labels whose score is at most the threshold, and the predicted ones, the most probable first.

    Args:
        logits: (B, C).
        predicted: the labels of each row's answer; adding them can only raise the coverage.
    """
    found = []
    for row, own in zip(scores(logits, multi_label=multi_label).tolist(), predicted, strict=True):
        ranked = sorted(zip(row, labels, strict=True), key=lambda each: each[0])
        found.append([label for score, label in ranked if score <= threshold or label in own])
    return found


@dataclass(frozen=True)
class Bin:
    """The answers whose confidence lies in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float  # mean
    accuracy: float


def reliability(confidence: Sequence[float], right: Sequence[bool]) -> tuple[Bin, ...]:
    """The bins that have answers, in order.

    Args:
        confidence: the probability of each answer.
        right: whether each answer is right.
    """
    members: list[list[int]] = [[] for _ in range(BINS)]
    for place, value in enumerate(confidence):
        members[min(BINS - 1, max(0, math.ceil(value * BINS) - 1))].append(place)
    return tuple(
        Bin(
            low=number / BINS,
            high=(number + 1) / BINS,
            count=len(inside),
            confidence=math.fsum(confidence[place] for place in inside) / len(inside),
            accuracy=sum(bool(right[place]) for place in inside) / len(inside),
        )
        for number, inside in enumerate(members)
        if inside
    )


@dataclass(frozen=True)
class Decided:
    """The answers whose probability is at least a threshold."""

    threshold: float
    count: int
    wrong: int  # of those

    @property
    def error(self) -> float | None:
        """The share of them that is wrong; None if there are none."""
        return self.wrong / self.count if self.count else None


def error_by_share(
    confidence: Sequence[float], right: Sequence[bool], kept: Sequence[float] = (), most: int = MOST_POINTS
) -> tuple[Decided, ...]:
    """What each threshold decides, from the strictest to the loosest.

    Of N answers, answer i has the probability p_i. At the threshold t

        share(t) = #{i: p_i >= t} / N        error(t) = #{i: p_i >= t, answer i is wrong} / #{i: p_i >= t}

    Every probability among the answers is a threshold, and equal ones are decided together.

    Args:
        confidence: the probability of each answer, (N,).
        right: whether each answer is right, (N,).
        kept: further thresholds, whose points are kept.
        most: about how many points; of more, those nearest to equal steps of the share are kept, and the last.
    """
    counts, wrong = dict.fromkeys((*confidence, *kept), 0), dict.fromkeys((*confidence, *kept), 0)
    for value, good in zip(confidence, right, strict=True):
        counts[value] += 1
        wrong[value] += not good
    found, last = list[Decided](), Decided(math.inf, 0, 0)
    step, reached = len(confidence) / most, 0.0
    ordered = sorted(counts, reverse=True)
    for place, value in enumerate(ordered):
        last = Decided(value, last.count + counts[value], last.wrong + wrong[value])
        if last.count >= reached or value in kept or place == len(ordered) - 1:
            found.append(last)
            reached = last.count + step
    return tuple(found)


@dataclass(frozen=True)
class Sureness:
    """What can be drawn of the answers to one question, without the answers.

    Args:
        bins: of the reliability.
        curve: the error by the share that is decided; its last point has every answer.
    """

    bins: tuple[Bin, ...]
    curve: tuple[Decided, ...]

    @property
    def answers(self) -> int:
        return sum(each.count for each in self.bins)

    @property
    def ece(self) -> float:
        return calibration_error(self.bins)

    def at(self, threshold: float | None) -> Decided:
        """What a threshold decides; None decides every answer. Between two points of the curve, the stricter one."""
        if threshold is None or not self.curve:
            return self.curve[-1] if self.curve else Decided(0.0, 0, 0)
        return next((each for each in reversed(self.curve) if each.threshold >= threshold), Decided(threshold, 0, 0))

    def to_json(self) -> SurenessSpec:
        """Lists, in the order of the fields of `Bin` and `Decided`."""
        return {
            "bins": [list(vars(each).values()) for each in self.bins],
            "curve": [list(vars(each).values()) for each in self.curve],
        }

    @classmethod
    def from_json(cls, value: Plain) -> Sureness:
        """What `to_json` gave. Raises ValueError for anything else."""
        if not isinstance(value, dict) or set(value) != {"bins", "curve"}:
            raise ValueError("expected bins and curve")
        for rows, length in ((value["bins"], 5), (value["curve"], 3)):
            if not isinstance(rows, list) or not all(isinstance(each, list) and len(each) == length for each in rows):
                raise ValueError(f"expected lists of {length} numbers")
            if not all(_is_number(each) for row in rows for each in row):
                raise ValueError("expected numbers")
        found = cls(tuple(Bin(*each) for each in value["bins"]), tuple(Decided(*each) for each in value["curve"]))
        counts = [each.count for each in found.curve]
        if counts != sorted(counts) or any(not 0 <= each.wrong <= each.count <= found.answers for each in found.curve):
            raise ValueError("expected counts that rise to the number of answers")
        return found


@dataclass(frozen=True)
class Confidences:
    """How sure the answers to one question are.

    Args:
        sure: the probability of each answer.
        raw: the same without the temperature.
        right: whether each answer is right.
        calibration: whose temperature it is; None: there is none.
    """

    sure: Sequence[float]
    raw: Sequence[float]
    right: Sequence[bool]
    calibration: Calibration | None = None

    @property
    def error(self) -> float:
        """ECE."""
        return calibration_error(reliability(self.sure, self.right))

    def sureness(self, threshold: float | None = None) -> Sureness:
        """What can be drawn of the answers. threshold: one that the curve has exactly."""
        kept = () if threshold is None else (threshold,)
        return Sureness(reliability(self.sure, self.right), error_by_share(self.sure, self.right, kept))


def stored_by_question(
    fitted: CalibrationSpec | dict[str, CalibrationSpec] | None,
) -> dict[str, CalibrationSpec]:
    """The calibrations in a task's spec, by question; the question is "" where there is only one."""
    if not isinstance(fitted, dict):
        return {}
    if _is_one(fitted):
        return {"": fitted}
    return fitted


def _is_one(fitted: CalibrationSpec | dict[str, CalibrationSpec]) -> TypeIs[CalibrationSpec]:
    """Whether it is a calibration, and not one for each of several questions."""
    return not isinstance(fitted.get("temperature", {}), dict)


def temperature_of(calibration: Calibration | None) -> float:
    """T, 1 without a calibration."""
    return 1.0 if calibration is None else calibration.temperature


def calibration_error(bins: Sequence[Bin]) -> float:
    """ECE: `sum_b (n_b / n) |accuracy_b - confidence_b|`; 0 without answers."""
    count = sum(each.count for each in bins)
    return sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / count if count else 0.0


def _temperature(slope: Callable[[float], float]) -> float:
    """T with the lowest loss, by bisection. slope: the derivative of the loss by 1 / T, which rises."""
    low, high = -math.log(HOTTEST), math.log(HOTTEST)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def _gain(z: Tensor, y: Tensor, temperature: float, *, multi_label: bool) -> float:
    """`2 (loss(1) - loss(T))`, a mean: how much more likely T makes the right labels. A text counts once."""
    from torch.nn import functional as F

    def loss(at: float) -> float:
        if multi_label:
            return float(F.binary_cross_entropy_with_logits(z / at, y))
        return float(F.cross_entropy(z / at, y))

    return 2 * (loss(1.0) - loss(temperature))


def _slope(z: Tensor, y: Tensor) -> Callable[[float], float]:
    """The derivative by 1 / T of `mean_b [log sum_c exp(z_c / T) - sum_c t_c z_c / T]`."""
    n, classes = z.shape
    wanted = (((n * y + 1 / classes) / (n + 1)) * z).sum(1)  # (B,)
    return lambda inverse: float(((z * inverse).softmax(-1).mul(z).sum(1) - wanted).mean())


def _binary_slope(z: Tensor, y: Tensor) -> Callable[[float], float]:
    """The derivative by 1 / T of `mean_bc [log(1 + exp(z / T)) - t z / T]`."""
    smoothed = (len(z) * y + 0.5) / (len(z) + 1)  # (B, C)
    return lambda inverse: float((((z * inverse).sigmoid() - smoothed) * z).mean())


def _is_number(value: Plain) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unreadable(reason: str) -> AdapterError:
    return AdapterError(f"the adapter's calibration cannot be read ({reason}): export the bundle again")
