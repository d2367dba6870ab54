"""A family in one file goes through everything, and no other file of the package changes."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from axes import toy_family
from axes.points import TOLERANCE, answered_together, classify_labels, known_to_children, served
from batches import own_target_logits, padded, rows

from turret import bases
from turret.adapters import attach, classify_logits, detach, target_logits
from turret.errors import AdapterError, PreflightRefused, UnknownFamily
from turret.families import FAMILIES
from turret.methods import LoRA, Prefix
from turret.recipe import Recipe
from turret.workspace import RunResult, Workspace

GOOD, BAD = ("great film", "a pleasure", "quick and great"), ("dull story", "boring and lazy", "a dull bank")
TEXTS = ["a great film", "a dull story about the bank", "quick"]
CHILDREN = """
from axes import toy_family
from turret.families import FAMILIES
FAMILIES["toy"] = toy_family.TOY
toy_family.register()
"""  # child processes run this first


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The family is in the table, here and in child processes."""
    toy_family.register()
    with known_to_children(tmp_path_factory.mktemp("beside"), CHILDREN) as patch:
        patch.setitem(FAMILIES, "toy", toy_family.TOY)
        yield


def write_table(path: Path, names: tuple[str, str], answers: tuple[str, str]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        for row in range(60):
            words = (GOOD if row % 2 else BAD)[row // 2 % 3]
            table.writerow([f"{words}, number {row}", answers[row % 2]])
    return path


@dataclass
class House:
    """A store with a LoRA that classifies and a prefix that generates, on one toy."""

    base: Path
    sorts: Recipe
    workspace: Workspace
    results: list[RunResult]
    plans: list[Any]


@pytest.fixture(scope="module")
def house(registered: None, tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    base = toy_family.save_base(folder / "toy")
    labelled = write_table(folder / "labelled.csv", ("text", "label"), ("bad", "good"))
    pairs = write_table(folder / "pairs.csv", ("document", "summary"), ("dull story", "great film"))
    train: Any = {"epochs": 5, "lr": 1e-2}
    sorts = Recipe(name="sorts", base=str(base), data=str(labelled), train=train)
    task: Any = {"max_tokens": 64, "max_new_tokens": 8}
    prefix = Prefix(num_virtual_tokens=4, reparametrize=False)
    writes = Recipe(name="writes", base=str(base), data=str(pairs), train=train, task=task, method=prefix)
    workspace, plans = Workspace(folder / "store"), list[Any]()
    results = [workspace.train(recipe, on_plan=plans.append) for recipe in (sorts, writes)]
    return House(base, sorts, workspace, results, plans)


def test_without_the_file_the_architecture_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "toy", raising=False)
    toy_family.register()
    base = toy_family.save_base(tmp_path / "toy")
    with pytest.raises(UnknownFamily, match="architecture 'toy' is not supported: expected one of albert, bart"):
        bases.load(str(base), task="classify")


def test_a_family_that_names_no_module_of_the_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", dataclasses.replace(toy_family.TOY, attention=("ToyTails",)))
    model = toy_family.build(toy_family.ToyForCausalLM)
    with pytest.raises(AdapterError, match="no attention module of the family toy: expected modules of class ToyTails"):
        attach(model, LoRA(r=2))
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_its_own_logits_through_the_hook_padded_and_unpadded_and_with_a_cache(registered: None) -> None:
    classifier = toy_family.build(toy_family.ToyForSequenceClassification, num_labels=3)
    inputs = rows()
    batch = padded(inputs, 3)
    own = classifier(**batch).logits
    attach(classifier, LoRA(r=2))
    for logits in (classifier(**batch).logits, classify_logits(classifier, inputs)):
        torch.testing.assert_close(logits, own, atol=2e-5, rtol=2e-5)
    assert torch.equal(detach(classifier)(**batch).logits, own)
    generator = toy_family.build(toy_family.ToyForCausalLM)
    sources, targets = rows(1), rows(2, (5, 2, 1, 7))
    wanted = own_target_logits(generator, sources, targets)
    left, settings = padded(rows(3), 3, left=True), {"max_new_tokens": 6, "do_sample": False}
    text = generator.generate(**left, **settings)
    attach(generator, LoRA(r=2))
    torch.testing.assert_close(own_target_logits(generator, sources, targets), wanted, atol=5e-5, rtol=2e-5)
    torch.testing.assert_close(target_logits(generator, sources, targets), wanted, atol=5e-5, rtol=2e-5)
    assert torch.equal(generator.generate(**left, **settings), text)
    generator.config.softcap = None
    uncapped = target_logits(generator, sources, targets)
    assert (uncapped - wanted).abs().max() > 1e-2, "control: its softcap matters"


@torch.no_grad()
def test_a_prefix_that_is_a_text_is_that_text_prepended(registered: None) -> None:
    classifier = toy_family.build(toy_family.ToyForSequenceClassification, num_labels=3)
    text, inputs = torch.tensor([11, 12, 13]), rows(0, (4, 3))
    own = classifier(**padded([torch.cat([text, row]) for row in inputs], 3)).logits
    attach(classifier, Prefix(num_virtual_tokens=3, reparametrize=False), init_ids=text)
    for logits in (classify_logits(classifier, inputs), classifier(**padded(inputs, 3)).logits):
        torch.testing.assert_close(logits, own, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_plan_training_proof_and_store(house: House) -> None:
    for planned, result, name in zip(house.plans, house.results, ("sorts", "writes"), strict=True):
        assert not planned.plan.refused
        assert result.timing["proof_seconds"] > 0  # what fails it is not stored
        assert house.workspace.resolve(f"{name}@1").base["family"] == "toy"
    assert house.workspace.resolve("sorts@1").metrics["test"]["accuracy"] > 0.9
    answers = house.workspace.predict("sorts", TEXTS)
    assert [answer["label"] for answer in answers[:2]] == ["good", "bad"]
    assert house.workspace.evaluate("sorts", str(house.sorts.data.source)).metrics["accuracy"] > 0.9


@pytest.mark.slow
def test_the_plan_knows_that_its_positions_end(house: House) -> None:
    with pytest.raises(PreflightRefused, match=r"need 400 positions, and .* has 298"):
        house.workspace.train(house.sorts.with_overrides({"task.max_tokens": "400"}))


@pytest.mark.slow
def test_a_mixed_batch_and_the_server(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = house.workspace.predict("sorts", TEXTS)
    engine = house.workspace.engine(str(house.base), dtype="float32")
    for name in ("sorts", "writes"):
        engine.warm(name)
    texts = [engine.generate([text], "writes")[0]["text"] for text in TEXTS]
    bare = [engine.generate([text], None)[0]["text"] for text in TEXTS]
    assert texts != bare
    wanted: Any = [("classify", "sorts"), ("generate", "writes"), ("generate", None)]
    answers, sizes = answered_together(
        engine, [(kind, text, name) for kind, name in wanted for text in TEXTS], monkeypatch
    )
    said = [answers[:3], answers[3:6], answers[6:]]
    assert sizes[0] == 9
    for answer, expected in zip(said[0], labels, strict=True):
        assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=TOLERANCE)
    assert [[each["text"] for each in some] for some in said[1:]] == [texts, bare]
    with served(house.workspace, engine) as client:
        assert classify_labels(client, "sorts", TEXTS) == [each["label"] for each in labels]
        written = client.post("/v1/completions", json={"model": "writes", "prompt": TEXTS[0], "temperature": 0}).json()
        assert written["choices"][0]["text"].strip() == texts[0]


@pytest.mark.slow
def test_a_comparison_trains_it_in_processes_of_their_own(house: House) -> None:
    found = house.workspace.compare(house.sorts, methods="base,lora", against="lora", seeds=1)
    row = next(row for row in found.rows if row.spec == "lora")
    assert row.score.mean == pytest.approx(100 * house.workspace.resolve(row.versions[0]).metrics["test"]["accuracy"])


@pytest.mark.slow
def test_export_import_and_a_merged_model(house: House, tmp_path: Path) -> None:
    house.workspace.export("sorts", tmp_path / "peft")
    again = Workspace(tmp_path / "store")
    assert again.import_adapter(tmp_path / "peft", "sorts").digest == house.workspace.resolve("sorts").digest
    house.workspace.export("sorts", tmp_path / "merged", form="merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
