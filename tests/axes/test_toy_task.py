"""Tasks in one file go through everything, with a loss over rows or over the batch; the package does not change."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_models
import tiny_training as tiny
import torch
from axes.points import known_to_children, require_one_pass_as_alone, served
from axes.toy_task import Order, Rate

from turret import adapters
from turret.cli.main import run
from turret.data import Labelled
from turret.errors import AdapterError, DataError, RecipeError
from turret.methods import LoRA
from turret.recipe import Recipe
from turret.tasks import TASKS, task_of
from turret.train.adamw import AdamW
from turret.train.batches import encode
from turret.train.slot import LocalSlot
from turret.workspace import RunResult, Workspace

WORDS = {"1": "dull boring story", "2": "lazy bank story", "3": "a story", "4": "a quick pleasure", "5": "great film"}
TEXTS = ["a great film", "a dull story about the bank", "quick"]
CHILDREN = """
from axes.toy_task import Order, Rate
from turret.tasks import register
register(Rate)
register(Order)
"""  # child processes run this first


@dataclass
class House:
    """A store with a grader and a classifier on one base."""

    folder: Path
    base: Path
    recipes: dict[str, Recipe]  # by the kind of task
    workspace: Workspace
    results: dict[str, RunResult]
    plans: list[Any]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The task is in the table, here and in child processes."""
    with known_to_children(tmp_path_factory.mktemp("beside"), CHILDREN) as patch:
        patch.setitem(TASKS, Rate.kind, Rate)
        patch.setitem(TASKS, Order.kind, Order)
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
    ranked = write_table(folder / "ranked.csv", "rank", list(WORDS))
    tables = {"rate": graded, "order": ranked}
    recipes = {
        kind: Recipe(name=f"{kind}s", base=str(base), data=str(each), train=train) for kind, each in tables.items()
    }
    workspace, plans = Workspace(folder / "store"), list[Any]()
    results = {kind: workspace.train(recipe, on_plan=plans.append) for kind, recipe in recipes.items()}
    workspace.train(Recipe(name="classes", base=str(base), data=str(sorted_), train=train))
    return House(folder, base, recipes, workspace, results, plans)


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


KINDS = pytest.mark.parametrize("kind", ["rate", "order"])


@pytest.mark.slow
@KINDS
def test_columns_plan_training_proof_and_store(house: House, kind: str) -> None:
    planned = next(each for each in house.plans if each.recipe.task.kind == kind)
    assert planned.recipe.data.label == ("grade" if kind == "rate" else "rank")
    assert not planned.plan.refused
    assert house.results[kind].timing["proof_seconds"] > 0  # what fails it is not stored
    version = house.workspace.resolve(f"{kind}s@1")
    assert version.task == {"kind": kind, "labels": list("12345"), "max_tokens": 256}
    assert 0 < version.metrics["test"]["closeness"] <= 1


@pytest.mark.slow
@KINDS
def test_answers_evaluation_replay_and_the_command_line(
    house: House, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{kind}s"
    answers = house.workspace.predict(name, TEXTS)
    assert all(set(answer["probabilities"]) == set("12345") for answer in answers)
    found = house.workspace.evaluate(name, str(house.recipes[kind].data.source))
    assert set(found.metrics) == {"closeness", "loss"}
    store = ["--store", str(house.workspace.store.root)]
    assert run(["predict", name, *TEXTS, *store]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"grade {answer['label']}" for answer in answers
    ]
    with pytest.raises(AdapterError, match="the bare base has no head"):
        house.workspace.predict(name, TEXTS, bare=True)


@pytest.mark.slow
def test_a_mixed_batch_with_a_classifier_and_the_server(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = house.workspace.engine(str(house.base), dtype="float32")
    names = ("rates", "orders", "classes")
    expected = require_one_pass_as_alone(house.workspace, engine, names, TEXTS, monkeypatch)
    with served(house.workspace, engine) as client:
        for name in ("rates", "orders"):
            said = client.post("/v1/classify", json={"model": name, "input": TEXTS}).json()["data"]
            assert [each["label"] for each in said] == [answer["label"] for answer in expected[name]]
            assert said[0]["num_classes"] == 5
            refused = client.post("/v1/completions", json={"model": name, "prompt": "a"})
            assert (refused.status_code, "cannot generate" in refused.text) == (409, True), refused.text


@pytest.mark.slow
@KINDS
def test_a_comparison_judges_its_own_score(house: House, kind: str) -> None:
    found = house.workspace.compare(house.recipes[kind], methods="base,lora", against="lora", seeds=1)
    assert (found.task, found.metric) == (kind, "closeness")
    row = next(row for row in found.rows if row.spec == "lora")
    assert row.score.mean == pytest.approx(100 * house.workspace.resolve(row.versions[0]).metrics["test"]["closeness"])
    assert not found.classes
    assert "closeness" in (Path(found.folder) / "report.html").read_text()


@pytest.mark.slow
@KINDS
def test_export_import_and_a_merged_model(house: House, kind: str, tmp_path: Path) -> None:
    name = f"{kind}s"
    house.workspace.export(name, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    again = Workspace(tmp_path / "store")
    assert again.import_adapter(tmp_path / "peft", name).digest == house.workspace.resolve(name).digest
    assert again.predict(name, TEXTS) == house.workspace.predict(name, TEXTS)
    house.workspace.export(name, tmp_path / "merged", form="merged")
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert said["problem_type"] == "regression"
    assert "num_labels=1" in (tmp_path / "peft" / "README.md").read_text()


def test_a_loss_over_the_batch_does_not_depend_on_its_pieces_and_compares_its_rows() -> None:
    gradients = {}
    for most in (4096, 12):
        base = tiny.base("bert")
        task = Order(list("12345"), base.tokenizer)
        adapters.attach(base.model, LoRA(r=4, init_lora_weights=False), generator=torch.Generator().manual_seed(0))
        base.model.train()
        rows = encode(task, [Labelled(WORDS[grade], grade) for grade in WORDS])
        optimiser = AdamW(adapters.trainable_parameters(base.model))
        optimiser.zero_gradients()
        found = LocalSlot(base, task, optimiser, 0, most).forward_backward(rows)
        gradients[most] = found, optimiser.gradients.clone()
        alone = [LocalSlot(base, task, optimiser, 0, most).forward_backward([row]) for row in rows]
        assert sum(alone) / len(alone) != pytest.approx(found, rel=1e-2), "the control: rows alone have no pairs"
    assert gradients[4096][0] == pytest.approx(gradients[12][0], rel=1e-5)
    scale = float(gradients[4096][1].abs().max())
    assert torch.allclose(gradients[4096][1], gradients[12][1], atol=1e-4 * scale)
