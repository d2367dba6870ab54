"""A base is known by the hash of its weights, not by its name.

Format 1 of a fingerprint:

- `"sha256:" + hex` of SHA-256 over the tensors of the body, in the order of their names (code points);
- the body is `model.base_model` without the language model head, the task's head (`Family.head_modules`) and what
  belongs to a task inside the body (`Family.body_excludes`, poolers), so that a classifier and a generator of one base
  have the same fingerprint;
- names are relative to the body; of tied tensors only the first name counts;
- a tensor is the line `name dtype shape` (as `layers.0.weight float32 64,64` and a newline), then its values, row by
  row, little-endian, in the dtype of the checkpoint.

Refuses to know where a model came from, but for the cache: hashing gigabytes at every start would be felt, so the
fingerprint of files that did not change since is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from turret.bases.cache import cache_folder, write_beside
from turret.families import family_of

FORMAT = 1
_ROWS = 1 << 26  # bytes handed to the hash at once


def fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint of the weights that `model` has now, in the dtype they have now."""
    digest = hashlib.sha256()
    for name, tensor in sorted(body(model)):
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _ROWS):
            digest.update(flat[start : start + _ROWS].cpu().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def body(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each tensor that makes the base what it is; tied tensors once, under their first name."""
    family = family_of(model.config)
    outside = ("lm_head", *family.head_modules, *family.body_excludes)
    for name, parameter in model.base_model.named_parameters():
        if not within(name, outside):
            yield name, parameter


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether the parameter called `name` is one of `modules` or lies inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def remembered(files: Sequence[Path]) -> str | None:
    """The fingerprint these weight files had when they were last hashed, if none of them changed since."""
    try:
        record = json.loads(_record(files).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = record.get("fingerprint") if isinstance(record, dict) else None
    return known if isinstance(known, str) and known.startswith("sha256:") else None


def remember(files: Sequence[Path], value: str) -> None:
    """Keep `value` for the next load; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        write_beside(_record(files), json.dumps({"fingerprint": value, "files": [str(file) for file in files]}))


def _record(files: Sequence[Path]) -> Path:
    # inode and ctime too: a copy that keeps the times (cp -p, rsync -a) must not pass for the file it replaced
    stats = [(str(file.resolve()), file.stat()) for file in files]
    state = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats]
    key = json.dumps([FORMAT, transformers.__version__, state])
    return cache_folder() / "fingerprints" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
