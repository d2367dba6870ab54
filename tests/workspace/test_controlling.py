"""Control on a two-layer base: one adapter per aspect, a classifier of aspects, and one-line errors."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import small_models

from turret.errors import DataError, NotFound, RecipeError
from turret.recipe import Recipe
from turret.workspace import Workspace

WORDS = {"good": "great film", "bad": "dull story"}


def recipe_in(folder: Path, family: str = "llama", rows: int = 24) -> Recipe:
    """A recipe for a table with one column per aspect."""
    base = folder / family
    if not base.exists():
        small_models.save_base(family, base)
    with (folder / "films.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["document", *WORDS])
        table.writerows([f"the market in london {number}", *WORDS.values()] for number in range(rows))
    made = Recipe(name="films", base=str(base), data=str(folder / "films.csv"))
    told = {"data.document": "document", "data.summary": "{aspect}", "data.test": "6", "task.kind": "summarize"}
    told |= {"task.max_target_tokens": "8", "train.epochs": "1", "train.max_steps": "2"}
    return made.with_overrides(told)


@pytest.mark.parametrize(
    ("change", "aspects", "words"),
    [
        ({}, ["good"], "at least two names"),
        ({"data.summary": "good"}, ["good", "bad"], "the data of all aspects are the same"),
        ({}, ["good", "ugly"], "ugly"),
    ],
)
def test_what_cannot_be_asked_is_one_line(change, aspects, words, tmp_path) -> None:
    recipe = recipe_in(tmp_path).with_overrides(change)
    with pytest.raises((RecipeError, DataError), match=words) as raised:
        Workspace(tmp_path / "store").control(recipe, aspects)
    assert "\n" not in str(raised.value)


def test_aspects_of_different_documents_are_refused(tmp_path) -> None:
    recipe_in(tmp_path)
    for aspect, rows in (("good", 24), ("bad", 30)):
        (tmp_path / f"{aspect}.csv").write_text(
            "document,summary\n" + "".join(f"d {n},{aspect}\n" for n in range(rows))
        )
    recipe = Recipe(name="films", base=str(tmp_path / "llama"), data=str(tmp_path / "{aspect}.csv"))
    with pytest.raises(DataError, match="are not the same"):
        Workspace(tmp_path / "store").control(recipe.with_overrides({"data.test": "6"}), ["good", "bad"])


@pytest.mark.slow
def test_every_aspect_is_a_version_and_the_same_call_again_trains_nothing(tmp_path) -> None:
    recipe, workspace = recipe_in(tmp_path), Workspace(tmp_path / "store")
    small_models.save_base("bert", tmp_path / "bert")
    asked = {"methods": "base,lora,prefix", "judge": str(tmp_path / "bert")}
    found = workspace.control(recipe, ["good", "bad"], **asked)
    names = {version.name for version in workspace.list()}
    assert names == {"films-good", "films-bad", "films-judge"}
    assert {version.comparison for version in workspace.list()} == {f"controls/{Path(found.folder).name}"}
    with pytest.raises(NotFound, match="only versions of comparisons"):
        workspace.resolve("films-good")
    assert [each.spec for each in found.rated] == ["base", "lora", "prefix"]
    assert found.rated[0].by_classifier.mean == pytest.approx(50), "the bare base writes the same for both"
    assert (Path(found.folder) / "report.html").exists()
    before, stages = len(workspace.list()), []
    again = workspace.control(recipe, ["good", "bad"], on_stage=stages.append, **asked)
    assert again.as_json() == found.as_json()
    assert len(workspace.list()) == before
    assert not [words for words in stages if " of " in words]
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    moved = Workspace(tmp_path / "elsewhere")
    assert moved.control(recipe, ["good", "bad"], on_stage=stages.append, **asked).as_json()["judge"]
    assert len(moved.list()) == before, "the classifier's data lies in the store, and its key must not depend on that"
    assert not [words for words in stages if " of " in words]
