"""Cells that share one process and one base give the results of processes of their own, also when that process dies."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_models

from turret.compare.design import Cell, candidates
from turret.errors import Interrupted, TrainingError
from turret.recipe import Recipe
from turret.store import Store
from turret.workspace.cells import CellRunner

pytestmark = pytest.mark.slow
# What differs between two processes that do the same.
MEASURED = {"timing", "memory", "latency", "wall_seconds", "run", "made", "resident", "version"}


def recipe_in(folder: Path, family: str = "bert", **changes: str) -> Recipe:
    small_models.save_base(family, folder / family)
    table = [("document", "summary") if family == "llama" else ("text", "label")]
    for row in range(60):
        answer, words = ("good", "a pleasure, and quick") if row % 2 else ("bad", "dull and boring")
        table.append((f"{words} {row}", f"{answer} film" if family == "llama" else answer))
    with (folder / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    settings = {"train.epochs": "1", "train.max_steps": "3", "data.test": "20"} | changes
    made = Recipe(name="reviews", base=str(folder / family), data=str(folder / "reviews.csv"))
    return made.with_overrides(settings)


def cells_of(recipe: Recipe, methods: str, seeds: Sequence[int]) -> list[Cell]:
    kind = "classify" if recipe.base.endswith("bert") else "generate"
    return [
        Cell(row, seed, 1.0, row.recipe.model_copy(update={"seed": seed}))
        for seed in seeds
        for row in candidates(methods, recipe, kind)
    ]


class Study:
    """A runner, the processes that it had, and what a test does when it says something."""

    def __init__(self, folder: Path, timed: int | None = None) -> None:
        self.processes: dict[int, bool] = {}  # by number: whether it is the shared one
        self.when: Callable[[str], None] = lambda _: None
        self.runner = CellRunner(Store(folder), folder / "comparisons" / "reviews-0", self._said, timed=timed)

    def _said(self, line: str) -> None:
        for each in psutil.Process().children():
            try:
                words = each.cmdline()
            except psutil.NoSuchProcess:  # it has just ended
                continue
            for module in ("resident_trainer", "job_process"):
                if f"turret.workspace.{module}" in words:
                    self.processes[each.pid] = module == "resident_trainer"
        self.when(line)

    @property
    def shared(self) -> list[int]:
        return [number for number, shared in self.processes.items() if shared]

    def run(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        self.runner.run(cells)
        files = {each.key: self.runner.folder / "cells" / each.key / "result.json" for each in cells}
        return {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}


def unmeasured(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results without times and memory."""
    kept = {key: {name: v for name, v in each.items() if name not in MEASURED} for key, each in results.items()}
    for each in kept.values():
        if each.get("best"):
            each["best"] = {name: value for name, value in each["best"].items() if name != "seconds"}
    return kept


@pytest.mark.parametrize(("family", "methods"), [("bert", "base,lora,prefix,head"), ("llama", "lora,prefix")])
def test_a_resident_cell_has_the_result_of_a_process_of_its_own(family: str, methods: str, tmp_path: Path) -> None:
    """Digest, answers, scores, metrics, losses and notes. Control: another seed gives other ones."""
    settings = {"task.max_target_tokens": "8"} if family == "llama" else {"data.validation": "8"}
    recipe = recipe_in(tmp_path, family, **settings)
    cells = cells_of(recipe, methods, [1])
    own, beside = Study(tmp_path / "own", timed=1), Study(tmp_path / "beside")

    expected, found = own.run(cells), beside.run(cells)

    assert unmeasured(found) == unmeasured(expected)
    assert {each["resident"] for each in expected.values()} == {False}
    assert {each["resident"] for each in found.values()} == {True}
    assert not own.shared
    assert len(own.processes) == len(cells)
    assert len(beside.processes) == len(beside.shared) == 1
    trained = [each for each in found.values() if each["version"]]
    assert max(each["timing"]["load_seconds"] for each in trained[1:]) < trained[0]["wall_seconds"]
    (other,) = Study(tmp_path / "other").run(cells_of(recipe, "lora", [2])).values()
    (lora,) = [each for key, each in found.items() if key.startswith("lora")]
    assert other["digest"] != lora["digest"]
    assert other["losses"] != lora["losses"]


def test_a_shared_process_that_is_killed_costs_its_cell_a_process_of_its_own_and_the_next_a_new_one(
    tmp_path: Path,
) -> None:
    recipe = recipe_in(tmp_path, **{"train.checkpoint_every": "1"})
    cells = cells_of(recipe, "lora", [1, 2, 3])
    expected = Study(tmp_path / "calm").run(cells)
    study, killed = Study(tmp_path / "killed"), list[int]()

    def kill(line: str) -> None:
        if not killed and "seed 2" in line and "step 1 of 3" in line:
            killed.extend(study.shared)
            os.kill(killed[0], signal.SIGKILL)

    study.when = kill
    found = study.run(cells)

    assert len(killed) == 1
    assert unmeasured(found) == unmeasured(expected)
    assert [each["resident"] for each in found.values()] == [True, False, True]
    assert len(study.shared) == 2
    assert len(study.processes) == 3
    assert not study.runner.failures
    assert len(list(study.runner.store.list())) == 3
    assert not any(psutil.pid_exists(number) for number in study.processes)


def test_a_cell_that_fails_ends_its_candidate_and_not_the_shared_process(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, **{"train.warmup": "0"})
    study = Study(tmp_path / "study")
    found = study.run(cells_of(recipe, "lora:lr=1e30,head", [1, 2]))
    assert list(study.runner.failures) == ["lora:lr=1e30"]
    assert "became infinite" in study.runner.failures["lora:lr=1e30"]
    assert [each["resident"] for each in found.values()] == [True, True]
    assert len(study.processes) == len(study.shared) == 1, "it was not tried again"


SHORT_OF_MEMORY = """
import sys, types
if "turret.workspace.resident_trainer" in sys.orig_argv:  # the process that cells share
    import psutil
    psutil.virtual_memory = lambda: types.SimpleNamespace(available=1 << 16, total=1 << 16)
"""


def test_a_cell_whose_predicted_memory_is_refused_is_measured_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells the shared process that almost no memory is free."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SHORT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    study = Study(tmp_path / "study")
    (result,) = study.run(cells_of(recipe_in(tmp_path), "lora", [1])).values()
    assert not result["resident"]
    assert not study.runner.failures
    assert len(study.processes) == 2
    assert len(study.shared) == 1


def test_a_cell_whose_data_is_smaller_than_its_batch_stays_on_the_resident_base(tmp_path: Path) -> None:
    """Its memory is predicted from the batches of its data, not from the largest that the recipe allows."""
    recipe = recipe_in(tmp_path, **{"train.batch_size": "65536", "train.micro_batch_tokens": "2000000000"})
    study = Study(tmp_path / "study")
    (result,) = study.run(cells_of(recipe, "lora", [1])).values()
    assert result["resident"]
    assert not study.runner.failures
    assert len(study.processes) == 1


def test_a_method_that_cannot_share_keeps_a_process_of_its_own(tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    found = study.run(cells_of(recipe_in(tmp_path), "full,lora", [1]))
    assert {key.partition("-")[0]: each["resident"] for key, each in found.items()} == {"full": False, "lora": True}
    assert len(study.processes) == 2
    assert len(study.shared) == 1


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Cell], dict[str, Any]]:
    """A long training, and its result."""
    folder = tmp_path_factory.mktemp("calm")
    recipe = recipe_in(folder, **{"train.epochs": "100", "train.max_steps": "200", "train.checkpoint_every": "1000"})
    cells = cells_of(recipe, "lora", [1])
    return cells, unmeasured(Study(folder / "calm").run(cells))


@pytest.mark.parametrize("how", ["budget", "Ctrl-C"])
def test_a_resident_cell_that_is_stopped_resumes_from_its_checkpoint(how: str, calm: Any, tmp_path: Path) -> None:
    cells, expected = calm
    study = Study(tmp_path)

    def stop(line: str) -> None:
        if "step 4 of" in line and how == "budget":
            study.runner.deadline = time.monotonic()
        elif "step 4 of" in line:
            raise KeyboardInterrupt

    study.when = stop
    with pytest.raises(Interrupted if how == "Ctrl-C" else TrainingError, match=r"stopped|budget ended"):
        study.run(cells)
    assert not any(psutil.pid_exists(number) for number in study.processes)
    (run,) = study.runner.store.runs()
    assert run["state"] == "interrupted"

    again = Study(tmp_path)
    assert unmeasured(again.run(cells)) == expected
    assert len(list(again.runner.store.runs())) == 1, "the run was resumed, not started anew"
