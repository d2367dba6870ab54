"""A replay asks two versions the same labelled examples and compares them with a paired test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import tiny_training
import torch

from turret import LoRA, Workspace, adapters, bases, bundles
from turret.errors import DataError
from turret.tasks.questions import Questions
from turret.workspace.evaluation import compare_scores

TEXTS = [f"{words}, number {number}" for number in range(12) for words in ("a great film", "a dull story")]
QUESTIONS = ("topic: bank", "topic: film", "urgent: no", "urgent: yes")


def made(name: str, seed: int, folder: Path, source: Path, *labels: str) -> Path:
    """The bundle of a classifier, or with labels of a version that answers several questions."""
    base = bases.load(str(source), task="classify", num_labels=len(labels) or 2)
    task: Any = tiny_training.task_of(tiny_training.recipe(task__max_tokens=40), tiny_training.dataset(), base)
    if labels:
        task = Questions(labels, base.tokenizer, 40)
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
        workspace.store.put("mail", made(f"mail{seed}", seed, folder, source, *QUESTIONS))
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


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("text,label\nA great film,bank\n", "expects label 'bank' in example 1, but tone@1 has labels "),
        ("text,equals\nA great film,Yes\n", "expects texts, but tone@1 classifies"),
    ],
)
def test_golden_examples_that_a_version_can_never_pass_are_not_replayed(workspace, tmp_path, table, problem) -> None:
    (tmp_path / "golden.csv").write_text(table)
    workspace.gate("tone", "production", golden=tmp_path / "golden.csv")
    with pytest.raises(DataError, match=f"cannot replay: golden:[0-9a-f]+ {problem}") as raised:
        workspace.replay("tone@1", "tone@2")
    (name,) = re.findall("golden:[0-9a-f]+", str(raised.value))
    workspace.gate("tone", "production", remove=[name])


def test_golden_examples_of_several_questions_pass_if_every_answer_is_right(workspace, tmp_path) -> None:
    answers = [answer["answers"].items() for answer in workspace.predict("mail@1", TEXTS)]
    right = ["|".join(f"{question}: {each['label']}" for question, each in answer) for answer in answers]
    golden = tmp_path / "golden.csv"
    golden.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in zip(TEXTS, right, strict=True)))
    workspace.gate("mail", "production", golden=golden)
    assert workspace.replay("mail@1", "mail@2").paired.a == 1.0
    assert workspace.replay("mail@2", "mail@1").paired.b == 1.0


def test_the_interval_of_a_replay_holds_the_truth_where_few_of_fifty_examples_differ() -> None:
    rng, held, truth = np.random.default_rng(0), 0, 0.03
    for _ in range(100):
        differ = rng.choice([-1, 0, 1], size=50, p=[0.0, 1 - truth, truth])
        found = compare_scores(np.where(differ < 0, 1.0, 0.0).tolist(), np.where(differ > 0, 1.0, 0.0).tolist())
        held += found.low <= truth <= found.high
    assert held >= 90
