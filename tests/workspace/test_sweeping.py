"""`turret sweep`: what is searched, that the test split is never read, and that a killed sweep goes on."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_models
from workspace.test_other_machine import until

from turret.cli.main import run as command
from turret.errors import RecipeError
from turret.recipe import Recipe
from turret.workspace import Workspace
from turret.workspace.sweeping import Choices, Listed, Proposed, Range, SweepRequest, Trial, parse_settings

RECIPE = Recipe(name="films", base="b", data="films.csv")
RATE = {"train.lr": Range(1e-5, 1e-1, whole=False)}


# --- settings ---------------------------------------------------------------------------------------------------------


def test_ranges_and_lists_are_searched_and_single_values_are_fixed() -> None:
    sets = {"train.lr": "1e-4..1e-2", "method.r": "4, 8,16", "train.epochs": "2", "train.warmup": "0..0.2"}
    fixed, searched = parse_settings(sets)
    assert fixed == {"train.epochs": "2"}
    assert searched == {
        "train.lr": Range(1e-4, 1e-2, whole=False),
        "method.r": Choices(("4", "8", "16")),
        "train.warmup": Range(0.0, 0.2, whole=False),
    }
    assert [each.log for each in searched.values() if isinstance(each, Range)] == [True, False]
    assert parse_settings({"method.r": "4..64"})[1] == {"method.r": Range(4, 64, whole=True)}


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"train.lr": "1e-2..1e-4"}, "expected two numbers, the lower one first"),
        ({"train.lr": "nan..1"}, "expected two numbers"),
        ({"train.lr": "1..inf"}, "expected two numbers"),
        ({"method.r": "4,"}, "expected at least two values"),
        ({"method.r": "4"}, "nothing to search: give --set"),
    ],
)
def test_a_mistake_in_a_setting_is_one_line(sets: dict[str, str], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        parse_settings(sets)
    assert "\n" not in str(error.value)


def test_lists_are_tried_in_all_combinations_without_optuna() -> None:
    request = SweepRequest(parse_settings({"method.r": "4,8", "train.lr": "1e-4,1e-3,1e-2"})[1])
    assert (request.combinations, request.count) == (6, 6)
    listed = Listed(request.settings)
    listed.know(trial(0, {"method.r": "4", "train.lr": "1e-3"}, 0.5))
    left = [listed.propose(number) for number in range(1, 6)]
    assert {(each["method.r"], each["train.lr"]) for each in left} == {
        ("4", "1e-4"), ("4", "1e-2"), ("8", "1e-4"), ("8", "1e-3"), ("8", "1e-2"),
    }  # fmt: skip


def test_a_range_without_optuna_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"needs Optuna .*pip install 'turret\[sweep\]'") as error:
        Proposed(RATE, 42)
    assert len(str(error.value)) < 300


def test_without_validation_examples_there_is_nothing_to_choose_by(tmp_path: Path) -> None:
    recipe = films(tmp_path, validation=False)
    with pytest.raises(RecipeError, match=r"judged by validation examples, and the data has none"):
        Workspace(tmp_path / "store").sweep(recipe, {"method.r": "2,4"})


# --- Optuna -----------------------------------------------------------------------------------------------------------


def trial(number: int, settings: dict[str, Any], value: float | None, *evaluations: float) -> Trial:
    made = Trial(number, settings, f"trial{number}", RECIPE, "finished" if value is not None else "pruned", value)
    made.evaluations = list(enumerate(evaluations, 1))
    return made


def distance(rate: float) -> float:
    """From the best rate, 1e-3, in powers of ten."""
    return abs(math.log10(rate) + 3)


def test_a_study_that_is_made_again_knows_what_the_trials_of_the_killed_one_showed() -> None:
    """Its proposals lie nearer to the best rate than those of a new study, the control."""
    pytest.importorskip("optuna", reason="needs turret[sweep]")
    draw = random.Random(0)
    known, new = Proposed(RATE, 1), Proposed(RATE, 1)
    for number in range(40):
        rate = 10 ** draw.uniform(-5, -1)
        known.know(trial(number, {"train.lr": rate}, -distance(rate)))
    means = []
    for study in (known, new):
        found = []
        for number in range(40, 50):
            settings = study.propose(number)
            made = Trial(number, settings, "", RECIPE)
            found.append(distance(float(settings["train.lr"])))
            made.state, made.value = "finished", -found[-1]
            study.tell(made)
        means.append(sum(found) / len(found))
    assert means[0] < means[1] / 2


def test_a_study_that_is_made_again_proposes_nothing_that_was_proposed() -> None:
    pytest.importorskip("optuna", reason="needs turret[sweep]")
    first, again = Proposed(RATE, 1), Proposed(RATE, 1)
    rates = [first.propose(number)["train.lr"] for number in range(3)]
    assert Proposed(RATE, 1).propose(0)["train.lr"] == rates[0], "the control: proposals depend on the seed"
    for number, rate in enumerate(rates):
        again.know(trial(number, {"train.lr": rate}, 0.5))
    assert not {again.propose(number)["train.lr"] for number in range(3, 6)} & set(rates)


def test_a_trial_whose_curve_is_below_the_median_of_the_others_is_ended() -> None:
    pytest.importorskip("optuna", reason="needs turret[sweep]")
    study = Proposed(RATE, 1)
    for number in range(6):
        study.know(trial(number, {"train.lr": 1e-3}, 0.9, 0.6, 0.8, 0.9))
    ended = []
    for number, curve in ((6, (0.1, 0.1)), (7, (0.7, 0.9))):
        made = Trial(number, study.propose(number), "", RECIPE)
        made.evaluations = list(enumerate(curve, 1))
        ended.append(study.ends(made))
        made.state, made.value = ("pruned", None) if ended[-1] else ("finished", 0.9)
        study.tell(made)
    assert ended == [True, False]
    states = [str(each.state).rpartition(".")[2] for each in study._study.trials]
    assert states[-2:] == ["PRUNED", "COMPLETE"]


# --- real ones --------------------------------------------------------------------------------------------------------


def films(folder: Path, *, validation: bool = True, wrong: str = "", **changes: str) -> Recipe:
    """A recipe whose data is a file for each split.

    Args:
        wrong: the split whose labels are turned round.
    """
    small_models.save_base("bert", folder / "bert")
    data = folder / f"films{wrong}"
    data.mkdir()
    for split, rows in (("train", 32), ("validation", 12), ("test", 12)):
        if split == "validation" and not validation:
            continue
        with (data / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            for row in range(rows):
                good = bool(row % 2) != (split == wrong)
                words = "great film, a pleasure" if row % 2 else "dull story, boring"
                table.writerow([f"{words} {split} {row}", "good" if good else "bad"])
    settings = {"train.epochs": "4", "train.batch_size": "8", "train.checkpoint_every": "1"} | changes
    recipe = Recipe(name="films", base=str(folder / "bert"), data=str(data))
    return recipe.with_overrides(settings if validation else {**settings, "data.validation": "none"})


LISTS = {"train.lr": "1e-5,1e-2"}


@pytest.mark.slow
def test_a_sweep_finds_the_better_rate_without_reading_the_test_split(tmp_path: Path, capsys: Any) -> None:
    """Turned labels of the test split change nothing; those of the validation split do, the control."""
    values = {}
    for wrong in ("", "test", "validation"):
        recipe, workspace = films(tmp_path, wrong=wrong), Workspace(tmp_path / f"store{wrong}")
        found = workspace.sweep(recipe, LISTS)
        values[wrong] = [each.value for each in found.trials]
        for each in found.trials:
            stored = workspace.resolve(str(each.version))
            assert set(stored.metrics) == {"validation"}
            assert stored.comparison is not None, "a plain name never means it"
    assert values[""] == values["test"]
    assert values[""] != values["validation"]
    workspace = Workspace(tmp_path / "store")
    again = workspace.sweep(films_again(tmp_path), LISTS)
    assert len(workspace.list()) == 2, "nothing is trained again"
    assert again.best.train.lr == (1e-2 if values[""][1] > values[""][0] else 1e-5)
    assert command(["train", again.file, "--store", str(tmp_path / "store"), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(trained["metrics"]) >= {"validation", "test"}


def films_again(folder: Path) -> Recipe:
    settings = {"train.epochs": "4", "train.batch_size": "8", "train.checkpoint_every": "1"}
    return Recipe(name="films", base=str(folder / "bert"), data=str(folder / "films")).with_overrides(settings)


@pytest.mark.slow
def test_a_killed_sweep_on_workers_goes_on_and_equals_a_local_one(tmp_path: Path) -> None:
    recipe = films(tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    expected = Workspace(tmp_path / "local").sweep(recipe, {"train.lr": "1e-5,1e-3,1e-2"})
    there = Workspace(tmp_path / "there")
    words = [sys.executable, "-m", "turret", "sweep", str(tmp_path / "recipe.toml"), "--set", "train.lr=1e-5,1e-3,1e-2"]
    words += ["--on", "workers", "--store", str(tmp_path / "there"), "--json"]
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    worker = subprocess.Popen(
        [sys.executable, "-m", "turret", "worker", "--store", str(tmp_path / "there")], stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: there.store.exists() and any(each["state"] == "finished" for each in there.runs()), 400)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    finally:
        worker.terminate()
        worker.wait(timeout=100)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [each["value"] for each in said["trials"]] == [each.value for each in expected.trials]
    assert said["best"]["settings"] == expected.ranked[0].settings
    assert [each["state"] for each in there.runs()] == ["finished"] * 3, "each trial was trained once"


@pytest.mark.slow
def test_optuna_searches_a_range_and_a_later_call_continues(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs turret[sweep]")
    recipe, workspace = films(tmp_path, **{"train.epochs": "2"}), Workspace(tmp_path / "store")
    first = workspace.sweep(recipe, {"train.lr": "1e-5..1e-1"}, trials=2)
    found = workspace.sweep(recipe, {"train.lr": "1e-5..1e-1"}, trials=4)
    assert found.trials[:2] == first.trials
    rates = [float(each.settings["train.lr"]) for each in found.trials]
    assert len(set(rates)) == 4
    assert all(1e-5 <= each <= 1e-1 for each in rates)
    assert len(workspace.runs()) == 4
