"""A replay asks two versions the same labelled examples and compares them with a paired test."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_models
import tiny_training
import torch

from turret import LoRA, Workspace, adapters, bases, bundles
from turret.errors import DataError

TEXTS = [f"{words}, number {number}" for number in range(12) for words in ("a great film", "a dull story")]


def made(name: str, seed: int, folder: Path, source: Path) -> Path:
    base = bases.load(str(source), task="classify", num_labels=2)
    task = tiny_training.task_of(tiny_training.recipe(task__max_tokens=40), tiny_training.dataset(), base)
    adapters.attach(base.model, LoRA(init_lora_weights=False), generator=torch.Generator().manual_seed(seed))
    tensors, head, method = adapters.extract(base.model)
    head = {key: value + 0.1 * place * (1 - 2 * seed) for place, (key, value) in enumerate(head.items())}
    info = adapters.BaseInfo(base.id, base.fingerprint, base.family.name)
    bundles.save_bundle(adapters.Adapter(method, tensors, head, info, task.spec()), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("replaying")
    source, workspace = small_models.save_base("bert", folder / "bert"), Workspace(folder / "store")
    for seed in (0, 1):
        workspace.store.put("tone", made(f"tone{seed}", seed, folder, source))
    return workspace


def test_who_is_right_where_the_other_is_wrong_is_counted_and_weighed(workspace, tmp_path) -> None:
    right = [str(answer["label"]) for answer in workspace.predict("tone@1", TEXTS)]
    other = [str(answer["label"]) for answer in workspace.predict("tone@2", TEXTS)]
    differ = sum(a != b for a, b in zip(right, other, strict=True))
    (tmp_path / "labelled.csv").write_text(
        "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in zip(TEXTS, right, strict=True))
    )
    found = workspace.replay("tone@1", "tone@2", str(tmp_path / "labelled.csv"))
    assert (found.score, found.paired.test, found.paired.examples) == ("accuracy", "McNemar", len(TEXTS))
    assert (found.paired.only_a, found.paired.only_b) == (differ, 0)
    assert found.paired.verdict == ("worse" if differ > 5 else "undecided")
    assert found.as_json()["text"].startswith(f"tone@2 is better on 0, tone@1 on {differ}")


def test_without_data_the_golden_examples_of_production_are_asked(workspace, tmp_path) -> None:
    right = [str(answer["label"]) for answer in workspace.predict("tone@1", TEXTS)]
    golden = tmp_path / "golden.csv"
    golden.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in zip(TEXTS, right, strict=True)))
    with pytest.raises(DataError, match="nothing to replay: tone@production requires no golden examples"):
        workspace.replay("tone@1", "tone@2")
    workspace.gate("tone", "production", golden=golden)
    found = workspace.replay("tone@1", "tone@2")
    assert (found.source, found.score, found.paired.a) == ("golden examples", "passed", 1.0)
