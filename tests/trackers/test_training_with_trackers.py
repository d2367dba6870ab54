"""A training with trackers: what they are told, that an outage changes nothing, and that a resume continues the run."""

from __future__ import annotations

import csv
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_models
import tiny_training
from trackers.own_trackers import rows, steps

from turret import Recipe, Workspace
from turret.errors import RecipeError
from turret.trackers import TRACKERS, Entry
from turret.workspace import RunResult

pytestmark = pytest.mark.slow  # its trainings take long

OWN = ("Recording", "RaisingAtFirstStep", "RaisingAtStart")


class Stopped(KeyboardInterrupt):
    pass


@dataclass(frozen=True)
class Story:
    """A training that was stopped after three steps and went on, with trackers of which two fail."""

    workspace: Workspace
    recipe: Recipe
    before: list[dict[str, Any]]  # what was recorded when it was stopped
    after: list[dict[str, Any]]  # and at the end
    warned: list[str]
    result: RunResult

    @property
    def folder(self) -> Path:
        return self.workspace.store.root / "runs" / self.result.run


@pytest.fixture(scope="module")
def own_trackers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        for name in OWN:
            patch.setitem(TRACKERS, name, Entry(f"trackers.own_trackers:{name}", "turret"))
        yield


def recipe_in(folder: Path) -> Recipe:
    small_models.save_base("bert", folder / "bert")
    with (folder / "tone.csv").open("w", newline="") as file:
        lines = [("text", "label"), *((each.text, each.label) for each in tiny_training.labelled(40))]
        csv.writer(file).writerows(lines)
    data = {"source": str(folder / "tone.csv"), "validation": 8, "test": 8}
    train = {"epochs": 2, "batch_size": 8, "evaluate": 2, "checkpoint_every": 1, "trackers": list(OWN)}
    return Recipe(name="tone", base=str(folder / "bert"), data=data, train=train)


@pytest.fixture(scope="module")
def story(own_trackers: None, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("tracked")
    recipe, workspace = recipe_in(folder), Workspace(folder / "store")

    def stop(record: Any) -> None:
        if record.step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        workspace.train(recipe, on_record=stop)
    (run,) = (workspace.store.root / "runs").iterdir()
    before, warned = rows(run), []
    result = workspace.train(recipe, on_warning=warned.append)
    return Story(workspace, recipe, before, rows(run), warned, result)


def test_a_tracker_gets_recipe_plan_steps_scores_and_the_version(story: Story) -> None:
    start = story.before[0]["start"]
    assert start["id"] == story.result.run
    assert start["name"] == "tone"
    assert start["settings"]["method.kind"] == "lora"
    assert start["settings"]["train.batch_size"] == 8
    assert start["settings"]["base.fingerprint"] == story.result.base["fingerprint"]
    assert "train.trackers" not in start["settings"]
    assert tomllib.loads(start["texts"]["recipe.toml"])["train"]["lr"] > 0
    assert '"checks"' in start["texts"]["plan.json"]
    found = steps(story.folder)
    curve = story.workspace.curve(story.result.run)
    assert list(found) == [record.step for record in curve] == list(range(1, 7))
    for record in curve:
        assert found[record.step]["train/loss"] == record.loss
        assert found[record.step]["train/lr"] == record.lr
        scores = {f"validation/{name}" for name in ("accuracy", "loss", "macro_f1")}
        assert (scores <= set(found[record.step])) == (record.metrics is not None)
    end = story.after[-1]
    assert end["finish"] == "finished"
    assert end["summary"]["version"] == "tone@1"
    assert end["summary"]["digest"] == story.result.digest
    assert end["summary"]["test/accuracy"] == story.result.metrics["test"]["accuracy"]


def test_a_stopped_training_ends_as_interrupted_and_its_resume_continues_the_same_run(story: Story) -> None:
    assert story.before[-1] == {"finish": "interrupted", "summary": {}}
    starts = [row["start"] for row in story.after if "start" in row]
    assert [start["id"] for start in starts] == [story.result.run] * 2
    assert starts[0]["after"] == 0
    assert starts[1]["after"] == story.result.resumed_from > 0


def test_an_outage_is_told_once_and_stops_nothing(story: Story) -> None:
    assert sorted(line.split(":")[0] for line in story.warned) == [f"tracker {name}" for name in sorted(OWN[1:])]
    assert [note for note in story.result.notes if note.startswith("tracker ")] == story.warned


def test_trackers_are_no_part_of_the_training(story: Story) -> None:
    kept = Recipe.load(story.folder / "recipe.toml")
    assert kept.train.trackers is None
    lineage = story.workspace.show("tone@1")["manifest"]["lineage"]
    assert "trackers" not in lineage["recipe"]


@pytest.mark.slow
def test_the_same_training_without_trackers_gives_the_same_version(story: Story) -> None:
    again = story.workspace.train(story.recipe.without_trackers(), fresh=True)
    assert again.digest == story.result.digest


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    missing = [name for name, entry in TRACKERS.items() if not _here(entry.library)]
    if not missing:
        pytest.skip("every tracker is installed here")
    recipe = Recipe(base="not/there", data="no.csv", train={"trackers": missing[:1]})
    with pytest.raises(RecipeError, match=rf"pip install 'turret\[{missing[0]}\]', or leave it out"):
        Workspace(tmp_path / "store").train(recipe)
    assert not (tmp_path / "store").exists()


def _here(library: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(library) is not None
