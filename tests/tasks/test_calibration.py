"""A temperature that makes probabilities honest, and sets of labels that hold the right one as often as stated."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import tokenizer
from torch.nn import functional as F

from turret.data import Labelled
from turret.errors import AdapterError, DataError
from turret.tasks import calibration, task_from_spec
from turret.tasks.calibration import (
    MOST_SCORES,
    Calibration,
    Confidences,
    Sureness,
    calibration_error,
    error_by_share,
    fit,
    reliability,
    require_calibration,
    scores,
)
from turret.tasks.classify import Classify
from turret.tasks.metrics import confusion

LABELS = tuple("abcde")
SURE = 2.5  # by which the logits of the simulations are too large


def drawn(count: int, seed: int, *, sure: float = SURE, spread: float = 1.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C) of a classifier that is too sure, and classes (B,) from the probabilities without that."""
    generator = torch.Generator().manual_seed(seed)
    true = spread * torch.randn(count, len(LABELS), generator=generator)
    classes = torch.multinomial(true.softmax(-1), 1, generator=generator)[:, 0]
    return sure * true, classes


def drawn_many(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C), and for every class whether the text has it."""
    generator = torch.Generator().manual_seed(seed)
    true = 1.6 * torch.randn(count, len(LABELS), generator=generator)
    return SURE * true, torch.bernoulli(true.sigmoid(), generator=generator)


def classifier(**settings: Any) -> Classify:
    return Classify(LABELS, tokenizer("bert"), 16, **settings)


def tempered(task: Classify, known: tuple[torch.Tensor, torch.Tensor], *, chose_weights: bool = False) -> Classify:
    """The task, calibrated on logits (B, C) and classes (B,); with `multi_label` ones and zeros (B, C)."""
    logits, targets = known
    if targets.ndim == 1:
        examples = [Labelled("", LABELS[place]) for place in targets.tolist()]
    else:
        examples = [Labelled("", tuple(LABELS[place] for place in row.nonzero()[:, 0].tolist())) for row in targets]
    return task.calibrated(logits, examples, chose_weights=chose_weights)


# --- the temperature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_temperature_is_the_one_that_made_the_logits_too_large(multi_label: bool) -> None:
    logits, targets = (drawn_many if multi_label else drawn)(4000, seed=1)
    fitted = fit(logits, targets, multi_label=multi_label, chose_weights=False)
    assert fitted.temperature == pytest.approx(SURE, rel=0.08)


@pytest.mark.parametrize("multi_label", [False, True])
def test_no_other_temperature_has_a_lower_loss(multi_label: bool) -> None:
    logits, targets = (drawn_many if multi_label else drawn)(300, seed=2)
    best = fit(logits, targets, multi_label=multi_label, chose_weights=False).temperature
    n = len(targets)

    def loss(temperature: float) -> float:
        z = logits.double() / temperature
        if multi_label:
            return float(F.binary_cross_entropy_with_logits(z, (n * targets.double() + 0.5) / (n + 1)))
        smoothed = (n * F.one_hot(targets, len(LABELS)).double() + 1 / len(LABELS)) / (n + 1)
        return float(F.cross_entropy(z, smoothed))

    for other in (0.5, 0.8, 0.95, 1.05, 1.3, 2.0):
        assert loss(best) < loss(best * other)


def test_a_classifier_that_is_always_right_gets_a_finite_temperature() -> None:
    classes = torch.arange(60) % len(LABELS)
    fitted = fit(F.one_hot(classes, len(LABELS)) * 8.0, classes, multi_label=False, chose_weights=False)
    assert 0.3 < fitted.temperature < 20
    assert math.isfinite(fitted.temperature)


def test_a_calibrated_task_answers_with_the_same_labels_and_a_lower_ece() -> None:
    task = classifier()
    held, test = drawn(2000, seed=3), drawn(4000, seed=4)
    calibrated = tempered(task, held)
    before, after = task.metrics(*test), calibrated.metrics(*test)
    assert before["ece"] > 0.15
    assert after["ece"] < 0.03
    assert [before[key] for key in ("accuracy", "macro_f1")] == [after[key] for key in ("accuracy", "macro_f1")]
    assert after["loss"] == pytest.approx(float(F.cross_entropy(test[0] / calibrated.calibration.temperature, test[1])))
    assert after["loss"] < before["loss"]
    assert [each["label"] for each in task.answers(test[0])] == [each["label"] for each in calibrated.answers(test[0])]
    assert task.calibration is None  # the first task is as it was


@pytest.mark.parametrize("sure", [0.7, 1.0, 1.5, SURE])
def test_a_temperature_from_few_examples_seldom_makes_the_ece_worse(sure: float) -> None:
    """Of a classifier that is too sure, right, or not sure enough; fitted on 20, 50 and 100 examples."""
    test = drawn(3000, seed=8, sure=sure)
    raw = classifier().metrics(*test)["ece"]
    for count in (20, 50, 100):
        worse = 0
        for seed in range(30):
            calibrated = tempered(classifier(), drawn(count, seed=100 + seed, sure=sure))
            worse += calibrated.metrics(*test)["ece"] > raw + 1e-9
        assert worse <= 5, f"{count} examples: worse in {worse} of 30"
        assert count > 20 or worse == 0  # of 20 examples none is taken


def test_control_without_evidence_and_a_least_number_it_would_be_worse_in_most_draws(monkeypatch) -> None:
    monkeypatch.setattr(calibration, "EVIDENT", -math.inf)
    monkeypatch.setattr(calibration, "FEWEST_TEMPERATURE", 0)
    test = drawn(3000, seed=8, sure=1.0)
    raw = classifier().metrics(*test)["ece"]
    fitted = [tempered(classifier(), drawn(20, seed=100 + seed, sure=1.0)) for seed in range(20)]
    assert sum(each.metrics(*test)["ece"] > raw for each in fitted) > 12


# --- ECE --------------------------------------------------------------------------------------------------------------


def test_the_ece_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(5)
    confidence = rng.random(500)
    right = rng.random(500) < confidence**2
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(reliability(confidence.tolist(), right.tolist())) == pytest.approx(expected)
    assert sum(each.count for each in reliability(confidence.tolist(), right.tolist())) == 500
    assert calibration_error(reliability([], [])) == 0.0


def test_probabilities_of_0_and_1_are_in_the_first_and_the_last_bin() -> None:
    found = reliability([0.0, 1.0, 1 / 15], [False, True, True])
    assert [(each.low, each.high, each.count) for each in found] == [(0.0, 1 / 15, 2), (14 / 15, 1.0, 1)]


def test_confusions_are_counted_by_right_class_and_answer() -> None:
    assert confusion(["a", "b", "b", "b"], ["a", "a", "b", "a"], ("a", "b", "c")) == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]


# --- coverage ---------------------------------------------------------------------------------------------------------


def coverages(calibrate_on: int, coverage: float, *, multi_label: bool = False, shift: float = 1.0) -> np.ndarray:
    """The measured coverage of 200 simulated classifiers, each calibrated on its own examples.

    Args:
        shift: factor of the logits of the test texts: 1 if they come from where the validation texts came from.
    """
    found, task, make = [], classifier(multi_label=multi_label), drawn_many if multi_label else drawn
    for seed in range(200):
        logits, targets = make(calibrate_on, 2 * seed)
        new, right = make(200, 2 * seed + 1)
        sets = tempered(task, (logits, targets)).label_sets(shift * new, coverage)
        examples = right.tolist()
        if multi_label:
            wanted = [{LABELS[place] for place, has in enumerate(row) if has} for row in examples]
        else:
            wanted = [{LABELS[each]} for each in examples]
        found.append(np.mean([each <= set(own) for each, own in zip(wanted, sets, strict=True)]))
    return np.asarray(found)


def interval(values: np.ndarray) -> tuple[float, float]:
    """A 99.7% interval of the mean."""
    half = 3 * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean() - half, values.mean() + half


@pytest.mark.parametrize(("count", "coverage"), [(20, 0.9), (50, 0.9), (99, 0.8)])
def test_sets_hold_the_right_label_as_often_as_stated(count: int, coverage: float) -> None:
    low, high = interval(coverages(count, coverage))
    exact = math.ceil((count + 1) * coverage) / (count + 1)  # of split conformal prediction without ties
    assert low < exact < high
    assert high > coverage
    assert exact <= coverage + 1 / (count + 1)


def test_sets_of_several_labels_hold_all_right_labels_as_often_as_stated() -> None:
    low, high = interval(coverages(50, 0.9, multi_label=True))
    assert high > 0.9
    assert low < 0.9 + 1 / 51


def test_control_texts_from_elsewhere_break_the_coverage() -> None:
    _, high = interval(coverages(50, 0.9, shift=-1.0))
    assert high < 0.8


def test_control_a_plain_quantile_of_few_examples_covers_less_than_stated() -> None:
    held = []
    for seed in range(2000):
        logits, targets = drawn(9, 2 * seed)
        right = scores(logits, multi_label=False)[torch.arange(9), targets].sort().values
        new, target = drawn(1, 2 * seed + 1)
        plain = float(right[math.ceil(9 * 0.88) - 1])  # instead of the rank ceil(10 * 0.88)
        held.append(float(scores(new, multi_label=False)[0, target[0]]) <= plain)
    assert interval(np.asarray(held, dtype=float))[1] < 0.88
    assert np.mean(held) == pytest.approx(8 / 10, abs=0.03)


def test_a_set_has_the_answer_and_the_most_probable_labels_first() -> None:
    task = tempered(classifier(), drawn(200, seed=6))
    logits, _ = drawn(50, seed=7)
    for answer, small, large in zip(
        task.answers(logits), task.label_sets(logits, 0.05), task.label_sets(logits, 0.99), strict=True
    ):
        assert answer["label"] == small[0] == large[0]
        ranked = sorted(answer["probabilities"], key=lambda label: -answer["probabilities"][label])
        assert small == ranked[: len(small)]
        assert large == ranked[: len(large)]
        assert set(small) <= set(large)


def test_a_coverage_that_the_examples_cannot_give_is_one_line() -> None:
    fitted = Calibration(1.0, 20, tuple(float(place) for place in range(20)))
    assert fitted.threshold(0.95) == 19.0  # the 20th of 20
    with pytest.raises(DataError, match=r"0\.99 needs 99 validation examples or more, and .* 20: ask for 0\.952 or le"):
        fitted.threshold(0.99)
    for wrong in (0.0, 1.0, 1.5, -0.1, math.nan):
        with pytest.raises(DataError, match="expected a number above 0 and below 1"):
            fitted.threshold(wrong)
    with pytest.raises(
        AdapterError, match="news@1 has no calibration, which a coverage needs: train it again with a v"
    ):
        require_calibration(None, "news@1")
    with pytest.raises(DataError, match="needs a calibration"):
        classifier().label_sets(torch.zeros(1, len(LABELS)), 0.9)


def test_of_many_examples_the_scores_that_are_kept_never_lower_the_coverage() -> None:
    logits, targets = drawn(3777, seed=8)
    fitted = fit(logits, targets, multi_label=False, chose_weights=False)
    assert len(fitted.scores) == MOST_SCORES
    every = scores(logits, multi_label=False)[torch.arange(3777), targets].sort().values.tolist()
    for coverage in (0.003, 0.1, 0.5, 0.9, 0.95, 0.999):
        rank = math.ceil(3778 * coverage - 1e-9)
        kept = fitted.threshold(coverage)
        assert kept >= every[rank - 1]
        assert kept <= every[min(3776, rank + 8)] + 1e-5  # and hardly raise it


# --- with the bundle --------------------------------------------------------------------------------------------------


def test_a_calibration_goes_through_the_spec() -> None:
    task = tempered(classifier(), drawn(30, seed=9), chose_weights=True)
    again = task_from_spec(json.loads(json.dumps(task.spec())), tokenizer("bert"))
    assert isinstance(again, Classify)
    assert again.calibration == task.calibration
    assert again.calibration is not None
    assert again.calibration.chose_weights
    logits = drawn(5, seed=10)[0]
    assert again.answers(logits) == task.answers(logits)
    assert "calibration" not in classifier().spec()  # a bundle without one is as it was before there were any


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0}, {"temperature": -1}, {"temperature": "2"}, {"temperature": True}, {"scores": []},
        {"scores": [2.0, 1.0]}, {"scores": [-1.0]}, {"scores": ["x"]}, {"examples": 1}, {"examples": 2.5},
        {"chose_weights": 1}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_calibration_that_no_training_writes_is_refused(change: dict[str, Any]) -> None:
    good = {"temperature": 1.5, "examples": 3, "scores": [0.1, 0.2, 0.9], "chose_weights": False}
    assert Calibration.from_json(good).to_json() == good
    with pytest.raises(AdapterError, match="calibration cannot be read"):
        Calibration.from_json(good | change)
    with pytest.raises(AdapterError, match="calibration cannot be read"):
        task_from_spec(classifier().spec() | {"calibration": good | change}, tokenizer("bert"))


def test_metrics_of_several_labels_have_an_ece_of_every_decision() -> None:
    task = classifier(multi_label=True)
    logits, targets = drawn_many(400, seed=11)
    chances = (logits.double()).sigmoid().flatten().tolist()
    expected = calibration_error(reliability(chances, (targets.flatten() > 0).tolist()))
    assert task.metrics(logits, targets)["ece"] == pytest.approx(expected)
    examples = [Labelled("x", ("a",)), Labelled("y", ())]
    assert task.metrics(logits[:2], task.targets(examples))["ece"] >= 0


# --- the error by the share that is decided ---------------------------------------------------------------------------


def by_hand(answers: list[tuple[float, bool]], threshold: float) -> tuple[int, int]:
    """How many answers a threshold decides, and how many of these are wrong: by counting."""
    decided = [right for sure, right in answers if sure >= threshold]
    return len(decided), decided.count(False)


LOADED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
ANSWERS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.51, 0.9, 1.0]) | st.floats(0, 1), st.booleans()), max_size=60
)


@LOADED
@given(ANSWERS, st.floats(0, 1))
def test_every_point_of_the_curve_is_what_its_threshold_decides(answers, kept) -> None:
    sure, right = [each for each, _ in answers], [each for _, each in answers]
    found = error_by_share(sure, right, (kept,))
    assert [each.threshold for each in found] == sorted({*sure, kept}, reverse=True)
    for each in found:
        assert (each.count, each.wrong) == by_hand(answers, each.threshold)
        assert each.error == (each.wrong / each.count if each.count else None)


@LOADED
@given(ANSWERS, st.floats(0, 1), st.integers(1, 20))
def test_a_thinned_curve_has_points_of_the_whole_one_and_its_end(answers, kept, most) -> None:
    sure, right = [each for each, _ in answers], [each for _, each in answers]
    whole, found = error_by_share(sure, right, (kept,), 10_000), error_by_share(sure, right, (kept,), most)
    assert set(found) <= set(whole)
    assert found[-1] == whole[-1]
    assert kept in [each.threshold for each in found]
    assert len(found) <= most + 3
    steps = [later.count - each.count for each, later in itertools.pairwise(found)]
    ties = max((sure.count(each) for each in sure), default=0)
    assert max(steps, default=0) <= len(sure) / most + 1 + ties


@LOADED
@given(ANSWERS, st.floats(0, 1))
def test_what_is_drawn_of_answers_survives_json_and_knows_each_threshold(answers, threshold) -> None:
    confidences = Confidences([each for each, _ in answers], [], [each for _, each in answers])
    found = confidences.sureness()
    assert Sureness.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert (found.answers, found.ece) == (len(answers), confidences.error)
    at = found.at(threshold)
    assert (at.count, at.wrong) == by_hand(answers, threshold)
    assert found.at(None).count == len(answers)
