"""One file that a run can go on from: weights, optimiser, random numbers and counters. No pickle is written or read.

The format, number 1, one safetensors file `checkpoint.safetensors` in the run's folder:

- metadata `turret`: a JSON object with `format`, `identity`, `layout` and `progress`
- `identity` says whose checkpoint it is (recipe, data, base, versions, world size); another run refuses it
- `layout` maps each trained parameter to its shape, in the order of the rows
- tensors `weights`, `exp_avg`, `exp_avg_sq`: (N,) float32; `best`: (N,), where a best state is kept
- tensors `random.python`, `random.torch`, `random.cuda`: states of the generators; of process 1, 2, ... of several
  `random.1.python` and so on

It is written beside, synced and renamed, so a kill or a full disk leaves the one before. Refuses to know the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turret.disk import NO_ROOM, make_folder, mount_of, number_of, plainly, sync
from turret.errors import TrainingError
from turret.train.memory import mega

FORMAT = 1
NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What was in the file."""

    tensors: dict[str, Tensor]
    layout: dict[str, list[int]]
    progress: dict[str, Any]


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    identity: dict[str, Any],
    layout: dict[str, Any],
    progress: dict[str, Any],
) -> None:
    """Replace the folder's checkpoint by this one, or leave it untouched and raise TrainingError."""
    text = json.dumps({"format": FORMAT, "identity": identity, "layout": layout, "progress": progress})
    final, beside, placed = folder / NAME, folder / (NAME + ".new"), False
    try:
        make_folder(folder)
        save_file(
            {name: each.detach().contiguous() for name, each in tensors.items()}, beside, metadata={"turret": text}
        )
        sync(beside)
        os.replace(beside, final)
        placed = True
        sync(folder)
    except (OSError, SafetensorError) as error:
        kept = _kept(folder, placed)
        with contextlib.suppress(OSError):  # the next one is written over it
            beside.unlink()
        raise TrainingError(_write_failure(folder, error, tensors, int(progress["step"]), kept)) from error


def load(folder: Path, *, identity: dict[str, Any]) -> Checkpoint | None:
    """The folder's checkpoint, None where there is none. Raises TrainingError when it is broken or another run's."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})["turret"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        written = dict(head["identity"])
        checkpoint = Checkpoint(tensors, dict(head["layout"]), dict(head["progress"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"checkpoint {path} cannot be read ({error}): delete it to begin the run anew") from error
    if head.get("format") != FORMAT:
        raise TrainingError(
            f"checkpoint {path} has format {head.get('format')}, expected {FORMAT}: delete it to begin anew"
        )
    for key, expected in json.loads(json.dumps(identity)).items():
        if written.get(key) != expected:
            raise TrainingError(
                f"checkpoint {path} belongs to another run: its {key} is {_short(written.get(key))}, this run's is "
                f"{_short(expected)}; resume with the same {key}, or delete it to begin anew"
            )
    return checkpoint


def step_of(folder: Path) -> int:
    """The step a run in this folder would go on from; 0 where it has no checkpoint."""
    path = folder / NAME
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            return int(json.loads(file.metadata()["turret"])["progress"]["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"checkpoint {path} cannot be read ({error}): delete it to begin the run anew") from error


def _kept(folder: Path, placed: bool) -> str:
    """What is there after a failure; placed: the new checkpoint has its name already."""
    if not (folder / NAME).exists():
        return "there is no earlier one"
    return "it may not outlast a power cut" if placed else "the previous checkpoint is intact"


def _write_failure(folder: Path, error: Exception, tensors: dict[str, Tensor], step: int, kept: str) -> str:
    """The sentence for a checkpoint that could not be written; a full or failing disk is named."""
    if number_of(error) not in NO_ROOM:
        said = plainly(error, folder)
        return f"checkpoint of step {step} could not be written to {folder} ({said}): make it writable; {kept}"
    needed = sum(each.numel() * each.element_size() for each in tensors.values())
    mount = mount_of(folder)
    return (
        f"disk full: checkpoint of step {step} needs {mega(needed)} in {folder}, the disk at {mount} has "
        f"{mega(shutil.disk_usage(mount).free)} free: make room and start the same command again; {kept}"
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
