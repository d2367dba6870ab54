"""Every kind of task has the CPU's loss and gradients in a training step on a pretend GPU, with any dropout."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from marks import fast_if_in
from pretend_gpu import on_cpu, pretend_gpu, to_gpu

from turret import bases
from turret.data.dataset import read_dataset
from turret.recipe import Recipe
from turret.tasks import TASKS, make_task, task_of
from turret.tasks.task import schemas
from turret.train.batches import EncodedRows
from turret.train.initialize import attach, optimiser_of
from turret.train.slot import LocalSlot

WORDS = ("dull boring story", "lazy bank story", "a story", "a quick pleasure", "great film")


def asked(n: int) -> list[dict[str, str]]:
    said = [{"role": "user", "content": f"{WORDS[n % 5]} {n}"}, {"role": "assistant", "content": WORDS[n * 3 % 5]}]
    return [*said, {"role": "user", "content": "a story"}, {"role": "assistant", "content": WORDS[n % 3]}]


ROWS: dict[str, Any] = {  # task -> a row by its number
    "classify": lambda n: {"text": f"{WORDS[n % 5]} {n}", "label": ("bad", "good")[n % 2]},
    "text_pairs": lambda n: {"premise": f"{WORDS[n % 5]} {n}", "hypothesis": WORDS[n * 3 % 5], "label": "ab"[n % 2]},
    "regression": lambda n: {"sentence1": f"{WORDS[n % 5]} {n}", "sentence2": WORDS[n * 3 % 5], "score": n * 3 % 5 / 2},
    "score": lambda n: {"text": f"{WORDS[n % 5]} {n}", "stars": 1 + n % 5},
    "questions": lambda n: {"text": f"{WORDS[n % 5]} {n}", "topic": "ab"[n % 2], "urgent": ("yes", "no")[n % 3 // 2]},
    "token_classification": lambda n: {"tokens": f"{WORDS[n % 5]} bank {n}".split(), "tags": tags(WORDS[n % 5])},
    "rerank": lambda n: {"query": f"{WORDS[n % 5]} {n}", "passage": WORDS[n % 7 % 5], "label": n % 2},
    "embedding": lambda n: {"anchor": f"{WORDS[n % 5]} {n}", "positive": f"{WORDS[n % 5]} again {n}"},
    "summarize": lambda n: {"document": f"{WORDS[n % 5]} {n}", "summary": WORDS[n * 3 % 5]},
    "generate": lambda n: {"prompt": f"{WORDS[n % 5]} {n}", "completion": WORDS[n * 3 % 5]},
    "chat": lambda n: {"messages": asked(n)},
    "preference": lambda n: {"prompt": f"{WORDS[n % 5]} {n}", "chosen": WORDS[n * 3 % 5], "rejected": "dull"},
}


COLUMNS = {"questions": {"label": ["topic", "urgent"]}}  # that no name of a column shows


def tags(before: str) -> list[str]:
    return ["O"] * len(before.split()) + ["B-ORG", "O"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tasks")
    for family in ("bert", "llama"):
        small_models.save_base(family, where / family)
    for task, row in ROWS.items():
        (where / f"{task}.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(30)))
    return where


def stepped(folder: Path, kind: str, dropout: float, on_gpu: bool) -> tuple[float, torch.Tensor]:
    """The loss of a step of six examples, and its gradients."""
    task_class = task_of(kind)
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "base": str(folder / ("llama" if task_class.generates else "bert")),
            "data": {"source": str(folder / f"{kind}.jsonl"), **COLUMNS.get(kind, {})},
            "task": {"kind": kind},
            "method": {"kind": "lora", "r": 4, "lora_dropout": dropout, "target_modules": "all-linear"},
        }
    )
    data = read_dataset(recipe.data, schemas(recipe.task), recipe.split_seed)
    base = bases.load(recipe.base, task=task_class.head, num_labels=task_class.num_labels(data.labels), dtype="float32")
    task = make_task(recipe.task, data, base.tokenizer, base.family.kind)
    with pretend_gpu() if on_gpu else nullcontext():
        if on_gpu:
            to_gpu(base.model)
        attach(recipe, base, task)
        base.model.train()
        optimiser = optimiser_of(recipe, base)
        with torch.no_grad():  # B begins at zero, and A would have no gradient
            drawn = torch.randn(optimiser.weights.shape, generator=torch.Generator().manual_seed(3))
            optimiser.set_weights(0.1 * drawn)
        items = EncodedRows(task, data.train).take(range(6))
        loss = LocalSlot(base, task, optimiser, 42, 64).forward_backward(items)
        return loss, on_cpu(optimiser.gradients).clone()


def test_every_task_is_here() -> None:
    assert set(ROWS) == set(TASKS)


QUICK = ("preference", "token_classification")


@pytest.mark.parametrize("dropout", [0.0, 0.3])  # of LoRA; an encoder has its own besides
@pytest.mark.parametrize("kind", fast_if_in(QUICK, ROWS))
def test_a_task_on_a_gpu_has_the_cpus_loss_and_gradients(folder: Path, kind: str, dropout: float) -> None:
    here, there = (stepped(folder, kind, dropout, on_gpu) for on_gpu in (False, True))
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    largest = float(here[1].abs().max())
    assert largest > 0
    assert float((there[1] - here[1]).abs().max()) <= 2e-4 * largest


@pytest.mark.slow
def test_control_other_dropout_is_noticed(folder: Path) -> None:
    one, other = (stepped(folder, "classify", p, on_gpu=False)[1] for p in (0.0, 0.3))
    assert float((one - other).abs().max()) > 1e-2 * float(one.abs().max())
