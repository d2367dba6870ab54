"""Comparisons on a two-layer base: cells in their own processes, stored results, verdicts, resuming after a kill."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import small_models
from simulated_comparison import dataset, result

from turret.compare.design import candidates, design
from turret.errors import NotFound, RecipeError, StoreError, TrainingError
from turret.recipe import Recipe
from turret.store import Store
from turret.workspace import Workspace
from turret.workspace.cells import CellRunner, command, folder_of, read_json, write_text
from turret.workspace.comparing import ComparisonRequest
from turret.workspace.controlling import ControlRequest

GOOD, BAD = ("great film", "a pleasure", "quick and great"), ("dull story", "boring and lazy", "a dull bank")


def recipe_in(folder: Path, family: str = "bert", **changes: str) -> Recipe:
    base = folder / family
    if not base.exists():
        small_models.save_base(family, base)
    with (folder / "reviews.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"] if family == "bert" else ["document", "summary"])
        for row in range(60):
            words = (GOOD if row % 2 else BAD)[row // 2 % 3]
            answer = "good" if row % 2 else "bad"
            table.writerow([f"{words}, number {row}", answer if family == "bert" else f"{answer} film"])
    settings = {"train.epochs": "1", "train.max_steps": "3", "data.test": "20"} | changes
    made = Recipe(name="reviews", base=str(base), data=str(folder / "reviews.csv"))
    return made.with_overrides(settings)


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    recipe, workspace, stages = recipe_in(folder), Workspace(folder / "store"), []
    found = workspace.compare(recipe, methods="lora", against="lora", seeds=1, on_stage=stages.append)
    return recipe, workspace, found, stages


def test_every_training_is_a_version_with_measured_costs(compared) -> None:
    _, workspace, found, _ = compared
    assert {str(version) for version in workspace.list()} == {"reviews@1"}
    for row in found.rows:
        costs = row.costs
        assert costs.trainable > 0
        assert costs.bundle_bytes == workspace.resolve(row.versions[0]).bytes
        assert costs.train_seconds.mean > 0
        assert costs.answer_seconds.mean > 0
        assert costs.measured["optimiser"] == 8 * costs.trainable
        assert set(costs.measured) <= set(costs.predicted)


def test_a_plain_name_never_means_a_training_of_a_comparison(compared) -> None:
    _, workspace, found, _ = compared
    (version,) = workspace.list()
    assert version.comparison == f"comparisons/{Path(found.folder).name}"
    with pytest.raises(NotFound, match="choose one with `turret promote reviews@NUMBER production`"):
        workspace.predict("reviews", ["a great film"])
    assert workspace.predict("reviews@1", ["a great film"])[0]["label"] in ("good", "bad")


def test_the_scores_are_those_of_the_stored_version(compared) -> None:
    _, workspace, found, _ = compared
    for row in found.rows:
        stored = workspace.resolve(row.versions[0]).metrics["test"]["accuracy"]
        assert row.score.mean == pytest.approx(100 * stored)


def test_the_report_lies_in_the_store_and_survives_a_gc(compared) -> None:
    _, workspace, found, _ = compared
    workspace.gc()
    assert {"report.html", "report.md", "report.json"} <= {path.name for path in Path(found.folder).iterdir()}
    assert json.loads((Path(found.folder) / "report.json").read_text())["name"] == "reviews"


def test_the_same_command_again_trains_nothing_and_says_the_same(compared) -> None:
    recipe, workspace, found, _ = compared
    before, stages = len(workspace.list()), []
    again = workspace.compare(recipe, methods="lora", against="lora", seeds=1, on_stage=stages.append)
    assert len(workspace.list()) == before
    assert again.as_json() == found.as_json()
    assert not [words for words in stages if "of 1" in words]


@pytest.mark.slow
def test_a_process_that_stored_its_version_and_died_is_only_measured_again(compared) -> None:
    recipe, workspace, found, _ = compared
    results = sorted(Path(found.folder).glob("cells/lora-*/result.json"))
    results[0].unlink()
    before = [str(version) for version in workspace.list()]
    again = workspace.compare(recipe, methods="lora", against="lora", seeds=1)
    assert [str(version) for version in workspace.list()] == before
    assert again.rows[0].versions == found.rows[0].versions


def test_a_comparison_that_is_held_by_another_process_is_refused(compared) -> None:
    from filelock import FileLock

    recipe, workspace, found, _ = compared
    with (
        FileLock(Path(found.folder) / "lock", thread_local=False),
        pytest.raises(StoreError, match="another process runs the comparison"),
    ):
        workspace.compare(recipe, methods="lora", against="lora", seeds=1)


def test_the_report_says_when_where_and_with_what_and_keeps_the_losses(compared) -> None:
    _, _, found, _ = compared
    said = json.loads((Path(found.folder) / "report.json").read_text())
    made = said["made"]
    assert made["from"][:4].isdigit()
    assert made["device"].startswith("cpu, ")
    assert made["threads"] >= 1
    assert "float32" in made["precision"]
    assert {"python", "turret", "torch"} <= set(made["versions"])
    assert len(said["rows"][0]["losses"][0][1]) == 3, "a loss a step"
    assert said["rows"][0]["trained_out"] is None, "three steps do not tell"
    assert said["command"].startswith("turret compare ")
    assert said["power"]["examples"] == 20


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "prefix", "method.num_virtual_tokens": "7", "train.lr": "1e-3", "seed": "7"},
        {"task.kind": "classify", "task.class_weights.good one": "2", "train.gradient_clip": "0.5"},
        {"method.target_modules": "query,value", "data.seed": "3", "train.lr": "auto", "data.text": "my text"},
        {"data.rename": '{"good" = "fine", "?" = ""}', "data.stratify": "true", "data.ignore": "a,b"},
    ],
)
def test_the_command_in_a_report_asks_for_the_same_again(tmp_path, changes) -> None:
    from turret.cli.options import Columns, Training, overrides

    recipe = recipe_in(tmp_path, **changes)
    asked = ComparisonRequest(
        methods="full,lora:r=4/8", seeds=3, fractions=(0.1, 1.0), margin=2.0, against="lora", lr=0.00012345678,
        budget=60.0, texts=False,
    )  # fmt: skip
    words = shlex.split(command("compare", recipe, asked))
    given = {name: [v for n, v in itertools.pairwise(words) if n == name] for name in ("--base", "--name", "--seed")}
    sets = [value for name, value in itertools.pairwise(words) if name == "--set"]
    assert overrides(sets)
    base, name, seed = (values[0] for values in given.values())
    training = Training(Columns(), base=base, name=name, seed=int(seed), sets=sets)
    assert training.recipe(words[2]) == recipe
    options = "--methods full,lora:r=4/8 --seeds 3 --fractions 0.1,1 --margin 2 --against lora --lr 0.00012345678"
    assert words[-13:] == [*options.split(), "--no-texts"]


def test_the_command_in_a_report_leaves_defaults_out(tmp_path) -> None:
    recipe = recipe_in(tmp_path)
    plain = command("compare", recipe, ComparisonRequest())
    assert not {"--methods", "--seeds", "--margin", "--against"} & set(shlex.split(plain))
    assert command("control", recipe, ControlRequest(("news", "sport"), judge="b", seeds=2)).endswith(
        " --aspects news,sport --seeds 2 --judge b"
    )


def test_progress_says_the_last_score_and_the_time_left(tmp_path) -> None:
    """Without running a training: the results of earlier cells are given."""
    made = design(
        recipe_in(tmp_path), candidates("full,lora", recipe_in(tmp_path), "classify"), seeds=2, fractions=(1.0,),
        against="full", margin=1.0, train=40,
    )  # fmt: skip
    cells, stages = list(made.cells()), []
    runner = CellRunner(Store(tmp_path / "store"), tmp_path, stages.append)
    assert runner.title(cells, 1) == "1 of 4  full, seed 42"
    done = result(cells[0], dataset(20), 0.9, 1)  # of 40 seconds
    runner.results[cells[0].key], runner.last = done, "full 90.0"
    write_text(tmp_path / "cells" / cells[0].key / "result.json", "{}")
    assert runner.title(cells, 2) == "2 of 4  lora, seed 42; last full 90.0; about 2 min 00 s left"


def test_progress_says_no_time_left_before_a_training_has_ended(tmp_path) -> None:
    made = design(
        recipe_in(tmp_path), candidates("base,full", recipe_in(tmp_path), "classify"), seeds=2, fractions=(1.0,),
        against="full", margin=1.0, train=40,
    )  # fmt: skip
    cells = list(made.cells())
    runner = CellRunner(Store(tmp_path / "store"), tmp_path, lambda _: None)
    ended = {cell.candidate.kind: cell for cell in reversed(cells)}
    base, full = ended["base"], ended["full"]
    runner.results[base.key] = replace(result(base, dataset(20), 0.5, 1), version=None)
    write_text(tmp_path / "cells" / base.key / "result.json", "{}")
    assert "left" not in runner.title(cells, cells.index(full) + 1)
    runner.results[full.key] = result(full, dataset(20), 0.9, 1)
    write_text(tmp_path / "cells" / full.key / "result.json", "{}")
    assert "left" in runner.title(cells, len(cells))  # control


def test_a_budget_that_is_over_at_once_leaves_everything_for_later(tmp_path) -> None:
    recipe, workspace = recipe_in(tmp_path), Workspace(tmp_path / "store")
    with pytest.raises(TrainingError, match="the budget ended before the first run did"):
        workspace.compare(recipe, methods="full,lora", seeds=1, budget=0)
    assert list(workspace.list()) == []


def test_what_is_judged_against_must_be_among_the_methods(tmp_path) -> None:
    recipe = recipe_in(tmp_path)
    with pytest.raises(RecipeError, match="--against"):
        Workspace(tmp_path / "store").compare(recipe, methods="lora", seeds=1)


def test_another_seed_or_method_is_the_same_comparison_and_other_data_is_another(tmp_path) -> None:
    recipe = recipe_in(tmp_path)
    one = folder_of(tmp_path, recipe, "sha256:a")
    assert one == folder_of(tmp_path, recipe.with_overrides({"method": "prefix", "train.lr": "1e-4"}), "sha256:a")
    assert one != folder_of(tmp_path, recipe, "sha256:b")
    assert one != folder_of(tmp_path, recipe.with_overrides({"train.epochs": "7"}), "sha256:a")


def test_a_result_is_whole_or_not_there(tmp_path) -> None:
    write_text(tmp_path / "a" / "result.json", '{"x": 1}')
    assert read_json(tmp_path / "a" / "result.json") == {"x": 1}
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "half.json").write_text('{"x": ')
    with pytest.raises(StoreError, match="delete it"):
        read_json(tmp_path / "half.json")


@pytest.mark.slow
def test_a_comparison_killed_at_any_moment_goes_on_with_what_is_missing(tmp_path) -> None:
    """After two SIGKILLs every training is stored exactly once."""
    recipe_in(tmp_path)
    command = [
        sys.executable,
        "-m",
        "turret",
        "compare",
        str(tmp_path / "reviews.csv"),
        "--base",
        str(tmp_path / "bert"),
    ]
    command += ["--methods", "full,lora", "--seeds", "2", "--store", str(tmp_path / "store"), "--json"]
    command += ["--set", "data.test=20", "--set", "train.epochs=1", "--set", "train.checkpoint_every=1"]
    for seconds in (9, 14):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["missing"] == 0
    versions = [version for row in said["rows"] for version in row["versions"]]
    assert len(versions) == len(set(versions)) == 4
    assert len(Workspace(tmp_path / "store").list()) == 4


@pytest.mark.slow
def test_writers_are_judged_by_rouge_and_by_what_they_forget(tmp_path) -> None:
    recipe = recipe_in(tmp_path, "llama", **{"task.max_target_tokens": "8"})
    found = Workspace(tmp_path / "store").compare(recipe, methods="base,full,lora", seeds=2)
    assert found.metric == "rougeL"
    assert all(len(row.losses) == 2 for row in found.rows[1:])
    base, full, lora = found.rows
    assert base.costs.forgetting.mean == 0
    assert full.costs.forgetting.mean != 0
    assert lora.verdict.seeds == 2
    assert not [row for row in found.rows if row.failed]


@pytest.mark.slow
def test_the_power_in_a_report_is_of_the_spread_that_was_seen(tmp_path: Path) -> None:
    recipe, workspace = recipe_in(tmp_path), Workspace(tmp_path / "store")
    asked = {"methods": "lora,prefix", "against": "lora", "seeds": 2}
    before = workspace.plan_comparison(recipe, **asked).power
    assert before.spread.source.startswith("assumed: "), "the control: nothing has run"
    found = workspace.compare(recipe, **asked)
    assert found.power.spread.source == "measured on the 2 seeds that have run"
    assert found.power.spread.examples != before.spread.examples
    assert found.power.shows_worse != before.shows_worse
    assert found.power.sentences()[-1] in (Path(found.folder) / "report.md").read_text()
    assert before.sentences()[1] not in (Path(found.folder) / "report.md").read_text()
    assert workspace.plan_comparison(recipe, **asked).power == found.power, "the plan of the same design knows it too"


@pytest.mark.slow
def test_a_regression_is_computed_once_and_judged_with_every_seed(tmp_path: Path) -> None:
    recipe, stages = recipe_in(tmp_path, **{"data.test": "20"}), []
    workspace = Workspace(tmp_path / "store")
    planned = workspace.plan_comparison(recipe, methods="linear,lora,lora:epochs=2", against="lora", seeds=2)
    assert planned.methods == ("linear", "lora", "lora epochs=2"), "the row for equal steps is there already"
    found = workspace.compare(recipe, methods="linear,lora", against="lora", seeds=2, on_stage=stages.append)
    linear, lora = found.rows
    assert (linear.versions, linear.steps, lora.steps) == ((), None, 3)
    assert linear.seeds == lora.seeds
    assert linear.verdict.seeds == 2
    assert linear.score.mean >= 90
    assert sum("fitting the logistic regression" in words for words in stages) == 1
    assert {str(version) for version in workspace.list()} == {"reviews@1", "reviews@2"}
    assert len(found.said) == 1
    assert "## Verdicts" in (Path(found.folder) / "report.md").read_text()
