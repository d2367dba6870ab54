"""The training curve and its file, and the random states of a run."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_training as tiny
import torch

from turret.train.curve import Curve, StepRecord, learnt_by_heart, read_curve
from turret.train.initialize import seeded_generators

RECORD = StepRecord(1, 9, 0.5, 1.25, 1e-3, 0.1 + 0.2, 8, 100, 0.5, 200.0, 1000)


def test_a_record_survives_json_to_the_last_bit() -> None:
    with_metrics = replace(RECORD, metrics={"loss": 1 / 3}, split="validation")
    for record in (RECORD, with_metrics):
        assert StepRecord.from_json(record.to_json()) == record
    assert "metrics" not in RECORD.to_json()
    slower = replace(RECORD, seconds=9.0, tokens_per_second=1.0, rss=5)
    assert slower != RECORD
    assert tiny.repeatable(slower) == tiny.repeatable(RECORD)


def test_a_resumed_curve_drops_what_comes_again_and_a_line_that_a_kill_cut(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    curve = Curve(path)
    for step in (1, 2, 3, 4):
        curve.append(replace(RECORD, step=step))
    with path.open("a") as file:
        file.write('{"step": 5, "ste')
    assert [record.step for record in read_curve(path)] == [1, 2, 3, 4]
    Curve(path, resume_after=2).append(replace(RECORD, step=3, loss=7.0))
    assert [(record.step, record.loss) for record in read_curve(path)] == [(1, 1.25), (2, 1.25), (3, 7.0)]
    assert list(read_curve(tmp_path / "none.jsonl")) == []


def evaluated(*metrics: tuple[float, float | None]) -> list[StepRecord]:
    """Steps 10, 20, ... with the loss and the accuracy of the test split."""
    return [
        replace(
            RECORD,
            step=10 * number,
            split="test",
            metrics={"loss": loss} | ({} if right is None else {"accuracy": right}),
        )
        for number, (loss, right) in enumerate(metrics, 1)
    ]


def test_a_training_that_learnt_its_examples_by_heart_is_told_with_what_rose_and_what_fell() -> None:
    assert learnt_by_heart([RECORD, *evaluated((0.7, 0.6), (0.66, 0.65), (1.4, 0.6), (2.61, 0.5625))]) == (
        "the training examples were learnt by heart: from step 20 to step 40, on the test split, "
        "loss went from 0.66 to 2.61 and accuracy went from 65.0% to 56.2%"
    )
    of_texts = learnt_by_heart(evaluated((3.0, None), (2.0, None), (2.5, None)))
    assert of_texts is not None
    assert of_texts.endswith("loss went from 2 to 2.5")


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [(0.66, 0.65)],
        [(0.7, 0.6), (0.66, 0.65)],  # the best one is the last one
        [(0.66, 0.65), (2.61, 0.66)],  # only too sure
        [(0.66, 0.65), (0.7, 0.6)],  # by chance
        [(2.0, None), (2.3, None)],
    ],
)
def test_chance_and_answers_that_are_too_sure_are_not_told_as_learnt_by_heart(metrics) -> None:
    assert learnt_by_heart([RECORD, *evaluated(*metrics)]) is None


def test_initial_weights_are_drawn_from_a_seed_and_the_programs_numbers_go_on() -> None:
    def draw() -> tuple[float, float]:
        return random.random(), float(torch.rand(()))

    torch.manual_seed(5)
    random.seed(5)
    undisturbed = [draw() for _ in range(3)]

    torch.manual_seed(5)
    random.seed(5)
    outer, inner = [], []
    for _ in range(3):
        outer.append(draw())
        with seeded_generators(1, torch.device("cpu")):
            inner.append(draw())
    assert outer == undisturbed
    assert len(set(inner)) == 1
    with seeded_generators(2, torch.device("cpu")):
        assert draw() not in inner, "control: another seed gives other numbers"
