"""What two processes do together for `tests/train/test_distributed.py`.

torchrun --standalone --nproc-per-node 2 tests/several_training.py FOLDER

Each scenario leaves its weights in FOLDER as `<name>.pt`, or a line in `said.json`; the last one fails on purpose.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny_training as tiny
import torch
from tiny_training import fit

from turret import adapters
from turret.cli.output import print_error
from turret.errors import DataError, TurretError
from turret.train import distributed

STILL: dict[str, Any] = {"train__lr": 1e-2, "train__epochs": 2, "train__evaluate": "never", "method__lora_dropout": 0.0}
BERT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DRAWN: dict[str, Any] = {
    "train__lr": 3e-3,
    "train__keep": "best",
    "train__checkpoint_every": 2,
    "method__lora_dropout": 0.3,
}


def still(kind: Any = "classify", folder: Path | None = None) -> Any:
    """Steps of a training that draws no random number; 25 examples in batches of 8 leave one for the last."""
    on = tiny.base("bert", **BERT) if kind == "classify" else tiny.base("llama", "generate")
    made, data = tiny.recipe(**STILL), tiny.dataset(kind, train=25)
    return on, fit(made, on, tiny.task_of(made, data, on), data, folder=folder)


def drawn(folder: Path) -> Any:
    """Steps of a training with dropout, evaluation, the best weights kept, and a checkpoint."""
    on, made, data = tiny.base("bert"), tiny.recipe(**DRAWN), tiny.dataset(train=25, validation=8)
    return on, fit(made, on, tiny.task_of(made, data, on), data, folder=folder)


def weights(fitted: Any) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in {**fitted.adapter.tensors, **fitted.adapter.head}.items()}


def finish(steps: Any) -> Any:
    records, fitted = tiny.train(steps)
    return {
        "weights": weights(fitted),
        "records": [tiny.repeatable(each) for each in records],
        "best": (fitted.progress.best_step, fitted.progress.best_metrics),
    }


def main(folder: Path) -> None:
    here = distributed.begin()
    said: dict[str, Any] = {"size": here.size, "counted": sum(here.gather(1))}

    def keep(name: str, steps: Any) -> None:
        done = finish(steps)
        if here.main:
            torch.save(done, folder / f"{name}.pt")

    for kind in ("classify", "summarize"):
        keep(kind, still(kind)[1])

    keep("whole", drawn(folder / "whole")[1])
    on, steps = drawn(folder / "stopped")
    for _ in range(3):
        next(steps)
    if not here.main:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        next(steps)
    except TurretError as error:
        said["stopped"] = str(error)
    keep("stopped", drawn(folder / "stopped")[1])

    on, steps = still()
    next(steps)
    if not here.main:
        with torch.no_grad():
            next(iter(adapters.trainable_parameters(on.model).values())).add_(1e-3)
    try:
        finish(steps)
    except TurretError as error:
        said["apart"] = str(error)
    try:
        here.require_same(recipe="seed = 1" if here.main else "seed = 2")
    except TurretError as error:
        said["unlike"] = str(error)
    if here.main:
        (folder / "said.json").write_text(json.dumps(said))

    _, steps = still()
    next(steps)
    if not here.main:
        raise DataError("the table of process 1 is gone: bring it back")
    finish(steps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]))
    except TurretError as error:
        print_error(str(error))
        sys.exit(error.exit_status)
