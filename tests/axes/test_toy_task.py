"""A task in one file goes through everything, and no other file of the package changes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_models
from axes.points import known_to_children, require_one_pass_as_alone, served
from axes.toy_task import Rate

from turret.cli.main import run
from turret.errors import AdapterError, DataError, RecipeError
from turret.recipe import Recipe
from turret.tasks import TASKS, task_of
from turret.workspace import RunResult, Workspace

WORDS = {"1": "dull boring story", "2": "lazy bank story", "3": "a story", "4": "a quick pleasure", "5": "great film"}
TEXTS = ["a great film", "a dull story about the bank", "quick"]
CHILDREN = """
from axes.toy_task import Rate
from turret.tasks import register
register(Rate)
"""  # child processes run this first


@dataclass
class House:
    """A store with a grader and a classifier on one base."""

    folder: Path
    base: Path
    recipe: Recipe
    workspace: Workspace
    result: RunResult
    plans: list[Any]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The task is in the table, here and in child processes."""
    with known_to_children(tmp_path_factory.mktemp("beside"), CHILDREN) as patch:
        patch.setitem(TASKS, Rate.kind, Rate)
        yield


def write_table(path: Path, column: str, answers: list[str]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", column])
        table.writerows([f"{WORDS[str(1 + row % 5)]}, number {row}", answers[row % 5]] for row in range(60))
    return path


@pytest.fixture(scope="module")
def house(registered: None, tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    base = small_models.save_base("bert", folder / "bert")
    graded = write_table(folder / "graded.csv", "grade", list(WORDS))
    sorted_ = write_table(folder / "sorted.csv", "label", ["bad", "bad", "so so", "good", "good"])
    train: Any = {"epochs": 3, "lr": 1e-3}
    recipe = Recipe(name="grades", base=str(base), data=str(graded), train=train)
    workspace, plans = Workspace(folder / "store"), list[Any]()
    result = workspace.train(recipe, on_plan=plans.append)
    workspace.train(Recipe(name="classes", base=str(base), data=str(sorted_), train=train))
    return House(folder, base, recipe, workspace, result, plans)


def test_without_the_file_the_task_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TASKS, "rate", raising=False)
    known = list(TASKS)
    said = f"there is no task 'rate': expected {', '.join(known[:-1])} or {known[-1]}"
    with pytest.raises(DataError, match=said):
        task_of("rate")
    kinds = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
    with pytest.raises(RecipeError, match=rf"task\.kind: expected {kinds}, given 'rate'"):
        Recipe(name="a", base="b", data="c", task={"kind": "rate"})


def test_a_recipe_may_name_it_and_keeps_its_name(registered: None) -> None:
    made = Recipe(name="a", base="b", data="c", task={"kind": "rate"})
    assert Recipe.from_toml(made.to_toml()) == made
    assert made.task.kind == "rate"


@pytest.mark.slow
def test_columns_plan_training_proof_and_store(house: House) -> None:
    (planned,) = house.plans
    assert planned.recipe.task.kind == "rate"
    assert planned.recipe.data.label == "grade"
    assert not planned.plan.refused
    assert house.result.timing["proof_seconds"] > 0  # what fails it is not stored
    version = house.workspace.resolve("grades@1")
    assert version.part("task") == {"kind": "rate", "labels": list("12345"), "max_tokens": 256}
    assert 0 < version.metrics["test"]["closeness"] <= 1


@pytest.mark.slow
def test_answers_evaluation_replay_and_the_command_line(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    answers = house.workspace.predict("grades", TEXTS)
    assert all(set(answer["probabilities"]) == set("12345") for answer in answers)
    found = house.workspace.evaluate("grades", str(house.recipe.data.source))
    assert set(found.metrics) == {"closeness", "loss"}
    store = ["--store", str(house.workspace.store.root)]
    assert run(["predict", "grades", *TEXTS, *store]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"grade {answer['label']}" for answer in answers
    ]
    with pytest.raises(AdapterError, match="the bare base has no head"):
        house.workspace.predict("grades", TEXTS, bare=True)


@pytest.mark.slow
def test_a_mixed_batch_with_a_classifier_and_the_server(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = house.workspace.engine(str(house.base), dtype="float32")
    expected = require_one_pass_as_alone(house.workspace, engine, ("grades", "classes"), TEXTS, monkeypatch)
    with served(house.workspace, engine) as client:
        said = client.post("/v1/classify", json={"model": "grades", "input": TEXTS}).json()["data"]
        assert [each["label"] for each in said] == [answer["label"] for answer in expected["grades"]]
        assert said[0]["num_classes"] == 5
        refused = client.post("/v1/completions", json={"model": "grades", "prompt": "a"})
        assert (refused.status_code, "cannot generate" in refused.text) == (409, True), refused.text


@pytest.mark.slow
def test_a_comparison_judges_its_own_score(house: House) -> None:
    found = house.workspace.compare(house.recipe, methods="base,lora", against="lora", seeds=1)
    assert (found.task, found.metric) == ("rate", "closeness")
    row = next(row for row in found.rows if row.spec == "lora")
    assert row.score.mean == pytest.approx(100 * house.workspace.resolve(row.versions[0]).metrics["test"]["closeness"])
    assert not found.classes
    assert "closeness" in (Path(found.folder) / "report.html").read_text()


@pytest.mark.slow
def test_export_import_and_a_merged_model(house: House, tmp_path: Path) -> None:
    house.workspace.export("grades", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    again = Workspace(tmp_path / "store")
    assert again.import_adapter(tmp_path / "peft", "grades").digest == house.workspace.resolve("grades").digest
    assert again.predict("grades", TEXTS) == house.workspace.predict("grades", TEXTS)
    house.workspace.export("grades", tmp_path / "merged", form="merged")
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert said["problem_type"] == "regression"
    assert "num_labels=1" in (tmp_path / "peft" / "README.md").read_text()
