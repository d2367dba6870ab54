"""Checkpoints of a training run: weights, optimiser state and counters in one file, without pickle.

Format 2 is one safetensors file, `checkpoint.safetensors`, in the run's folder:

- metadata `turret`: a JSON object with `format`, `identity`, `layout` and `progress`
- `identity`: recipe, data, base, versions and world size; a run with another identity does not resume from it
- `layout`: the shape of each trained parameter, in the order in which they lie in `weights`
- tensors `weights`, `exp_avg`, `exp_avg_sq`: (N,) float32; `best`: (N,), if the best weights are kept. With
  `adamw8bit` the moments are (N,) uint8, and `exp_avg_absmax`, `exp_avg_sq_absmax` are their scales

A step's random numbers follow from the recipe's seed and its number, so no state of a generator is kept. Format 1 kept
them: a run with such a checkpoint starts over.

A checkpoint is written to a new file, synced and renamed, so after a kill or on a full disk the previous one remains.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turret.bases.device import gigabytes
from turret.disk import NO_ROOM, describe_error, errno_of, make_folder, mount_of, sync
from turret.errors import CheckpointMismatch, CheckpointTooOld, TrainingError, one_line
from turret.json_types import JsonObject, Plain

FORMAT = 2
OLDER = (1,)
NAME = "checkpoint.safetensors"


class Origin(TypedDict):
    """What the weights of a run depend on, beside its recipe. parent, reference: digests of versions."""

    data: str
    base: str
    tokenizer: str  # digest of the base's
    world_size: int
    device: NotRequired[str]
    parent: NotRequired[str]
    reference: NotRequired[str]


class Identity(Origin):
    """What a run must have in common with the checkpoint that it resumes."""

    recipe: str  # its hash
    torch: str
    transformers: str


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file."""

    tensors: dict[str, Tensor]
    layout: dict[str, list[int]]
    progress: JsonObject


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    identity: Identity,
    layout: dict[str, list[int]],
    progress: Mapping[str, Plain],
) -> None:
    """Replace the folder's checkpoint. On an error, keep the previous one and raise TrainingError."""
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
        remaining = _remaining(folder, placed)
        with contextlib.suppress(OSError):  # the next save overwrites it
            beside.unlink()
        step = progress["step"]
        number = step if isinstance(step, int) else 0
        raise TrainingError(_write_failure(folder, error, tensors, number, remaining)) from error


def load(folder: Path, *, identity: Identity) -> Checkpoint | None:
    """The folder's checkpoint; None if there is none.

    Raises:
        CheckpointMismatch: it belongs to another run, or to an older turret (CheckpointTooOld).
        TrainingError: it is broken.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})["turret"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        written = dict(head["identity"])
        checkpoint = Checkpoint(tensors, dict(head["layout"]), dict(head["progress"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"checkpoint {path} cannot be read ({error}): delete it to start over") from error
    if head.get("format") != FORMAT:
        kind = CheckpointTooOld if head.get("format") in OLDER else TrainingError
        raise kind(f"checkpoint {path} has format {head.get('format')}, expected {FORMAT}: delete it to start over")
    expected = json.loads(json.dumps(identity))
    for key in {**expected, **written}:  # each may have one that the other lacks: a device, a parent
        theirs, ours = written.get(key), expected.get(key)
        if theirs != ours:
            raise CheckpointMismatch(
                f"checkpoint {path} belongs to another run: its {key} is {one_line(str(theirs or 'none'), 40)}, this "
                f"run's is {one_line(str(ours or 'none'), 40)}; resume with the same {key}, or delete it to start over"
            )
    return checkpoint


def step_of(folder: Path) -> int:
    """The step that a run in this folder resumes after; 0 if it has no checkpoint."""
    path = folder / NAME
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads(file.metadata()["turret"])
            return 0 if head.get("format") in OLDER else int(head["progress"]["step"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"checkpoint {path} cannot be read ({error}): delete it to start over") from error


def _remaining(folder: Path, placed: bool) -> str:
    """Which checkpoint is left after a failed save. placed: the new one was already renamed."""
    if not (folder / NAME).exists():
        return "there is no earlier checkpoint"
    return "the checkpoint may not survive a power cut" if placed else "the previous checkpoint is intact"


def _write_failure(folder: Path, error: Exception, tensors: dict[str, Tensor], step: int, remaining: str) -> str:
    """The error text for a checkpoint that could not be written. It names a full disk."""
    if errno_of(error) not in NO_ROOM:
        reason = describe_error(error, folder)
        return f"checkpoint of step {step} could not be written to {folder} ({reason}): make it writable; {remaining}"
    needed = sum(each.numel() * each.element_size() for each in tensors.values())
    mount = mount_of(folder)
    return (
        f"disk full: checkpoint of step {step} needs {gigabytes(needed)} in {folder}, the disk at {mount} has "
        f"{gigabytes(shutil.disk_usage(mount).free)} left: free some space and start the command again; {remaining}"
    )
