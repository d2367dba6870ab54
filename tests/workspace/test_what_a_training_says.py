"""What a training says of its result: whether more of it would help, and whether its probabilities are calibrated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import small_models
from small_tables import films, write_jsonl

from turret import Full, LoRA, Recipe, Workspace
from turret.methods import Method
from turret.workspace import RunResult

ROWS = [{"text": f"{row['text']}, take {take}", "label": row["label"]} for take in range(3) for row in films()]
PAIRS = [{"document": row["text"], "summary": f"a {row['label']} film"} for row in films()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("said")
    for family in ("bert", "llama"):
        small_models.save_base(family, folder / family)
    return folder


def trained(
    folder: Path, family: str, rows: Any, data: dict[str, Any], method: Method | None = None, **train: Any
) -> RunResult:
    recipe = Recipe(
        name="films", base=str(folder / family), data={"source": rows, **data},
        method=method or LoRA(r=2),
        train={"evaluate": "never"} | train,
    )  # fmt: skip
    return Workspace(folder / "store").train(recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "advised"),
    [
        ({"epochs": 4, "lr": 3e-3}, "set train.epochs to 8 (now 4)"),
        ({"epochs": 8, "lr": 3e-3, "max_steps": 16}, "set train.max_steps to 32 (now 16)"),
        ({"epochs": 4, "lr": 3e-3, "max_steps": 500}, "set train.epochs to 8 (now 4)"),
        ({"epochs": 60, "lr": 3e-2}, None),  # the control: the loss has levelled off
    ],
)
def test_a_training_whose_loss_still_falls_says_in_one_line_what_would_help(
    folder: Path, train: dict[str, Any], advised: str | None
) -> None:
    said = trained(folder, "llama", PAIRS, {"test": 8}, **train).advice
    if advised is None:
        assert said == []
        return
    assert said == [f"the training loss still fell at the last step, so longer training would help: {advised}"]
    assert len(said[0]) < 300
    assert "\n" not in said[0]
    assert ("max_steps" in said[0]) == (train.get("max_steps") == 16), "a setting that does not limit it is not named"


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_training_that_learns_by_heart_says_how_the_best_evaluation_is_kept(folder: Path, keep: str) -> None:
    draw, swapped = random.Random(3), {"good": "bad", "bad": "good"}
    rows = [{**row, "label": draw.choice(list(swapped))} for row in films()]  # nothing to learn but each row
    source = folder / keep
    source.mkdir()
    for split in ("train", "test", *(["validation"] if keep == "best" else [])):
        kept = rows if split == "train" else [{**row, "label": swapped[row["label"]]} for row in rows]
        write_jsonl(source / f"{split}.jsonl", kept)
    train = {"keep": keep, "evaluate": 8, "epochs": 30, "lr": 1e-3}
    said = trained(folder, "bert", str(source), {}, Full(), **train).advice
    told = [each for each in said if each.startswith("the training examples were learnt by heart: from step ")]
    assert len(told) == (keep == "last"), said
    if told:
        assert "on the test split, loss went from" in told[0]
        assert told[0].endswith(': set train.keep = "best", which keeps the weights of the best evaluation')


@pytest.mark.slow
@pytest.mark.parametrize(("validation", "found"), [(0, "no validation split"), (5, "5 validation examples"), (24, "")])
def test_a_classifier_says_when_its_probabilities_are_not_calibrated(folder: Path, validation: int, found: str) -> None:
    data = {"test": 8} | ({"validation": validation} if validation else {})
    advice = trained(folder, "bert", ROWS, data, epochs=1).advice
    words = f"probabilities are not calibrated ({found}) and are often too sure: set data.validation = 0.1"
    assert any(note.startswith(words) for note in advice) == bool(found)
    assert any("not calibrated" in note for note in advice) == bool(found), "the control: 24 examples calibrate it"
