"""A base is known by the hash of its weights, not by its name.

Format 1 of a fingerprint:

- `"sha256:" + hex` of SHA-256 over the tensors of the body, in the order of their names (code points);
- the body is `model.base_model` without the language model head, the task's head (`Family.head_modules`) and what
  belongs to a task inside the body (`Family.body_excludes`, poolers), so that a classifier and a generator of one base
  have the same fingerprint;
- names are relative to the body; of tied tensors only the first name counts;
- a tensor is the line `name dtype shape` (as `layers.0.weight float32 64,64` and a newline), then its values, row by
  row, little-endian, in the dtype of the checkpoint.

Knows models and families. Refuses to know where a model came from and what is done with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from turret.families import Family, family_of

FORMAT = 1
_BLOCK = 1 << 26  # bytes handed to the hash at once


def fingerprint(model: Any) -> str:
    """The fingerprint of the weights that `model`, with nothing attached, has now, in the dtype they have now."""
    return hashed(body(model.named_parameters(), model, family_of(model.config)))


def body(named: Iterable[tuple[str, Tensor]], model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Of a model's named parameters those that make the base what it is, named relative to the body."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    outside = (*family.beside_body, *family.body_excludes)
    for name, tensor in named:
        relative = name.removeprefix(prefix)
        if name.startswith(prefix) and not within(relative, outside):
            yield relative, tensor


def hashed(named: Iterable[tuple[str, Tensor]]) -> str:
    """`sha256:…` over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda each: each[0]):
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _BLOCK):
            digest.update(flat[start : start + _BLOCK].cpu().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether the parameter called `name` is one of `modules` or lies inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
