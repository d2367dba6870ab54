"""The table of answers, and the answers on a screen: the answer is first, and each other label is there once."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from command_line import typed

from turret import LoRA, Workspace, adapters, bases, bundles
from turret.tasks.classify import Classify
from turret.tasks.score import Score

LEVELS = ("1", "2", "3")
ABOVE = (0.6, 0.45)  # so the levels have 0.4, 0.15 and 0.45: the median is 2, and 3 is the most probable
CHANCES = (0.1, 0.4, 0.3)  # of three labels, of which none is answered


def put(workspace: Workspace, name: str, task: Any, chances: tuple[float, ...], base: Any, folder: Path) -> None:
    """Store a version that gives every text these probabilities."""
    adapters.attach(base.model, LoRA(), generator=torch.Generator().manual_seed(0))
    tensors, head, method = adapters.extract(base.model)
    logits = torch.tensor(chances).logit()
    head = {key: logits if value.ndim == 1 else torch.zeros_like(value) for key, value in head.items()}
    info = adapters.BaseInfo(base.id, base.fingerprint, base.family.name)
    bundles.save_bundle(adapters.Adapter(method, tensors, head, info, task.spec()), folder / name)
    workspace.store.put(name, folder / name)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("predicted")
    source, workspace = str(small_models.save_base("bert", folder / "bert")), Workspace(folder / "store")
    words = small_models.tokenizer("bert")
    put(workspace, "stars", Score(LEVELS, words), ABOVE, bases.load(source, task="classify", num_labels=2), folder)
    many = Classify(("a", "b", "c"), words, multi_label=True)
    put(workspace, "tags", many, CHANCES, bases.load(source, task="classify", num_labels=3), folder)
    return workspace


@pytest.mark.parametrize(
    ("name", "ranked", "screen"),
    [
        ("stars", [("2", 0.15), ("3", 0.45), ("1", 0.4)], "2 0.15  3 0.45  1 0.40"),
        ("tags", [("", None), ("b", 0.4), ("c", 0.3)], "none  b 0.40  c 0.30"),
    ],
)
def test_the_answer_comes_first_and_then_the_other_labels(
    workspace: Workspace, tmp_path: Path, name: str, ranked: list[tuple[str, float | None]], screen: str
) -> None:
    (tmp_path / "texts.csv").write_text("text\na great film\n")
    store = ["--store", str(workspace.store.root)]
    status, _, err = typed(
        "predict", name, str(tmp_path / "texts.csv"), "--out", str(tmp_path / "out.csv"), "--top", "3", *store
    )
    assert status == 0, err
    with (tmp_path / "out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    for end, (label, chance) in zip(("", "_2", "_3"), ranked, strict=True):
        assert row[f"predicted{end}"] == label
        assert chance is None or float(row[f"probability{end}"]) == pytest.approx(chance, abs=1e-3)
    status, out, err = typed("predict", name, "a great film", "--top", "3", *store)
    assert status == 0, err
    assert out.startswith(f"{screen}  a great film")
