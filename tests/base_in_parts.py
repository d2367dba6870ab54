"""Trainings with a base in parts, by processes that torchrun starts for `tests/train/test_sharded.py`.

torchrun --standalone --nproc-per-node 2 tests/base_in_parts.py FOLDER train NAME...       into the store FOLDER/parts
... FOLDER kill NAME                        into FOLDER/killed; the main process kills itself after step KILLED
... FOLDER load                             bytes that loading and a pass took at their peak, to FOLDER/load.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import small_models
import torch

from turret import bases
from turret.bases.device import CPU, ChosenDevice
from turret.bases.sharded import gather_once, load_in_parts, own_part
from turret.cli.output import print_error
from turret.errors import TurretError
from turret.recipe import Recipe
from turret.train import distributed, memory
from turret.train.distributed import Processes
from turret.workspace import Workspace

KILLED = 5
STILL: dict[str, Any] = {"kind": "lora", "r": 4, "lora_dropout": 0.0}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {  # base, table, method, train
    "labels": ("bert", "films", STILL, {}),
    "lines": ("llama", "lines", {**STILL, "target_modules": "all-linear"}, {}),
    "prefix": ("llama", "lines", {"kind": "prefix", "num_virtual_tokens": 4}, {"keep": "best", "lr": 2e-3}),
    "twice": ("llama", "lines", STILL, {"checkpoint_layers": True, "micro_batch_tokens": 60}),
    "both": ("t5", "lines", STILL, {}),
    "drawn": ("bert", "films", {"kind": "lora", "lora_dropout": 0.3}, {"checkpoint_every": 2, "keep": "best"}),
}


def recipe(folder: Path, name: str, *, shard: bool = True) -> Recipe:
    base, table, method, train = CASES[name]
    settings = {"epochs": 2, "batch_size": 5, "dtype": "float32", "lr": 1e-2, **train}
    settings |= {"shard": "fsdp2"} if shard else {}
    task = {"max_target_tokens": 8} if table == "lines" else {}
    data = {"source": str(folder / f"{table}.csv"), "validation": 6, "test": 6}
    return Recipe(name=name, base=folder / base, data=data, task=task, method=method, train=settings)


def save(folder: Path) -> None:
    """The bases and tables of all cases."""
    small_models.save_base("bert", folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    small_models.save_base("llama", folder / "llama", num_hidden_layers=3)
    small_models.save_base("t5", folder / "t5", dropout_rate=0.0)
    for name, head, answers in (
        ("films", "review,sentiment", ("bad", "good")),
        ("lines", "document,summary", ("boring", "a pleasure")),
    ):
        rows = [f"{'great film' if row % 2 else 'dull story'} {row},{answers[row % 2]}" for row in range(33)]
        (folder / f"{name}.csv").write_text("\n".join([head, *rows]) + "\n")


def save_wide(folder: Path) -> None:
    """A base of nearly 400 MB, nearly all of it in its layers, of 10 MB each."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 16}
    small_models.save_base("llama", folder / "wide", **sizes)


def load(folder: Path, here: Processes) -> None:
    """Load a base in parts, make a pass, then the same with the whole base, and measure the growth of each."""

    def grown(make: Any) -> tuple[Any, int]:
        memory.reset_peak()
        before = memory.resident_bytes()
        return make(), memory.peak() - before

    device, mesh = ChosenDevice(CPU, "as asked for"), distributed.mesh()
    settings: dict[str, Any] = {"task": "generate", "dtype": "float32"}
    found = []
    for read in (lambda: load_in_parts(str(folder / "wide"), mesh=mesh, device=device, **settings), None):
        base, loading = grown(read or (lambda: bases.load(str(folder / "wide"), **settings)))
        # what is loaded whole is a view of a mapped file, which takes memory when it is read
        _, passing = grown(lambda base=base: gather_once(base.model))
        kept = sum(own_part(each).nbytes for each in base.model.parameters())
        found.append((kept, loading, passing))
    everyones = here.gather(found)
    if here.main:
        (folder / "load.json").write_text(json.dumps(everyones))


def main(folder: Path, verb: str, *names: str) -> None:
    here = distributed.begin()
    if verb == "load":
        return load(folder, here)

    def kill(record: Any) -> None:
        if verb == "kill" and record.step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    workspace = Workspace(folder / ("killed" if verb != "train" else "parts"))
    for name in names:
        workspace.train(recipe(folder, name), on_record=kill)
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
    except TurretError as error:
        print_error(str(error))
        sys.exit(error.exit_status)
