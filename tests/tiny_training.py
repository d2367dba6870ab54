"""Trainings that take a second: small random bases, texts anyone can classify, and a child that can be killed.

python tests/tiny_training.py FOLDER            trains in FOLDER, printing each step's number
... FOLDER --kill-after K                       the same, and kills itself with SIGKILL after step K
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import small_models
import torch

from turret import train as trainer
from turret.adapters import BaseInfo
from turret.data import Dataset, Labelled, Pair
from turret.errors import OutOfMemory
from turret.families import Family, family_of
from turret.recipe import Recipe
from turret.tasks import make_task
from turret.train.batches import EncodedRow, EncodedRows, splits_of
from turret.train.checkpoint import step_of
from turret.train.curve import Curve, StepRecord
from turret.train.initialize import attach, optimiser_of
from turret.train.loop import Fitted
from turret.train.training_plan import FoundRate, Plan

GOOD = ("great film", "a pleasure to watch", "quick and great")
BAD = ("dull story", "boring and lazy", "a dull bank")
PLAIN = ("the market", "in london", "about the fox", "over the dog", "one line", "it is", "the text", "shares")


@dataclass
class Base:
    """What training needs of a loaded base."""

    model: Any
    tokenizer: Any
    family: Family
    id: str = "small"
    revision: str | None = None
    fingerprint: str = "sha256:small"
    dtype: str = "float32"
    fresh: tuple[str, ...] = ()
    bytes: int = 0
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    quantization: str = "none"
    checkpoints: str | None = None
    pass_tokens: int | None = None
    digests: Any = None
    reference: Any = None
    drawn_in: torch.dtype = torch.float32
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> BaseInfo:
        return BaseInfo(self.id, self.fingerprint, self.family.name, self.revision)


def base(family: str, task: Any = "classify", **changes: Any) -> Base:
    model = small_models.build(family, task, num_labels=2, **changes).requires_grad_(False)
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    return Base(model, small_models.tokenizer(family), family_of(model.config), bytes=size)


def labelled(count: int, start: int = 0) -> list[Labelled]:
    rows = []
    for number in range(start, start + count):
        words = (GOOD if number % 2 else BAD)[number // 2 % 3]
        plain = " ".join(PLAIN[(number * 7 + place * 5) % len(PLAIN)] for place in range(number % 4))
        rows.append(Labelled(f"{plain} {words}".strip(), "good" if number % 2 else "bad"))
    return rows


def pairs(count: int, start: int = 0) -> list[Pair]:
    return [Pair(each.text, GOOD[0] if each.label == "good" else BAD[0]) for each in labelled(count, start)]


def dataset(kind: Any = "classify", train: int = 24, validation: int = 0, test: int = 8) -> Dataset:
    make: Any = labelled if kind == "classify" else pairs
    return Dataset(
        train=make(train),
        validation=make(validation, train),
        test=make(test, train + validation),
        kind=kind,
        labels=("bad", "good") if kind == "classify" else (),
        columns={},
        notes=(),
        duplicates=0,
        digest="sha256:tiny",
    )


def recipe(**overrides: Any) -> Recipe:
    """`train__lr=1e-2` sets `train.lr`."""
    settings = {"train.batch_size": "8", "train.epochs": "2", "task.max_tokens": "64", "task.max_target_tokens": "16"}
    settings |= {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return Recipe(name="tiny", base="small", data={"source": "tiny.csv"}).with_overrides(settings)


def task_of(made: Recipe, data: Dataset, on: Base) -> Any:
    return make_task(made.task, data, on.tokenizer, on.family.kind)


def started(on: Base, kind: Any = "classify", **overrides: Any) -> tuple[Any, Any, list[EncodedRow]]:
    """What a step needs: a task and an optimiser, of an adapter that is attached to the base, and six examples."""
    if on.tokenizer.pad_token_id is None:
        on.tokenizer.pad_token = on.tokenizer.eos_token
    made, data = recipe(**overrides), dataset(kind)
    task = task_of(made, data, on)
    attach(made, on, task)  # type: ignore[arg-type]
    on.model.train()
    return task, optimiser_of(made, on), EncodedRows(task, data.train).take(list(range(6)))  # type: ignore[arg-type]


def filled(made: Recipe, on: Any, task: Any, data: Dataset) -> Recipe:
    """The recipe with its defaults, as the functions of `turret.train` take it."""
    return trainer.fill_recipe(made, on, task.kind, len(splits_of(made, data).train))


def fit(made: Recipe, on: Any, task: Any, data: Dataset, **how: Any) -> Generator[StepRecord, None, Fitted]:
    """`turret.train.fit` with the recipe's defaults."""
    return (yield from trainer.fit(filled(made, on, task, data), on, task, data, **how))


def find_rate(made: Recipe, on: Any, task: Any, data: Dataset, **how: Any) -> FoundRate:
    """`turret.train.find_rate` with the recipe's defaults."""
    return trainer.find_rate(filled(made, on, task, data), on, task, data, **how)


def plan(made: Recipe, on: Any, task: Any, data: Dataset, **how: Any) -> Plan:
    """`turret.train.plan` with the recipe's defaults."""
    return trainer.plan(filled(made, on, task, data), on, task, data, **how)


def train(steps: Generator[StepRecord, None, Fitted]) -> tuple[list[StepRecord], Fitted]:
    """Every record, and what the generator returned."""
    records = []
    while True:
        try:
            records.append(next(steps))
        except StopIteration as end:
            return records, end.value


def repeatable(record: StepRecord) -> dict[str, Any]:
    """The fields that are bit-equal in a repeated or resumed run."""
    measured = ("seconds", "tokens_per_second", "rss")
    return {key: value for key, value in asdict(record).items() if key not in measured}


def main(folder: Path, kill_after: int | None) -> None:
    """A training with dropout, evaluation and the best weights kept; its curve and tensors go to `folder`."""
    made = recipe(train__keep="best", train__checkpoint_every=2, method__lora_dropout=0.3, train__lr=3e-3)
    on, data = base("bert"), dataset(validation=8)
    curve = Curve(folder / "curve.jsonl", resume_after=step_of(folder))
    steps = fit(made, on, task_of(made, data, on), data, folder=folder)
    try:
        while True:
            record = next(steps)
            curve.append(record)
            print(record.step, flush=True)
            if record.step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
    except StopIteration as end:
        fitted: Fitted = end.value
    tensors = {**fitted.adapter.tensors, **fitted.adapter.head}
    values = {name: tensor.flatten().tolist() for name, tensor in tensors.items()}
    (folder / "weights.json").write_text(json.dumps({"resumed_from": fitted.resumed_from, "weights": values}))


def run_out_of_memory(grant: int) -> None:
    """64 texts of 500 tokens in one pass, with so many bytes of address space more than are in use."""
    settings = {"train__batch_size": 64, "task__max_tokens": 500, "train__micro_batch_tokens": 100_000}
    made, on, data = recipe(**settings), base("bert", num_hidden_layers=4), dataset(train=64)
    data = replace(data, train=[Labelled("the market in london " * 100, each.label) for each in data.train])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + grant, resource.RLIM_INFINITY))
    try:
        train(fit(made, on, task_of(made, data, on), data))
    except OutOfMemory as error:
        print(error)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    if "--grant" in sys.argv:
        run_out_of_memory(int(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
