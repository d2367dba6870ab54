"""The fingerprint of a base: a hash of its weights.

Format 1:

- `"sha256:" + hex` of SHA-256 over the tensors of the body, sorted by name (code points);
- the body is `model.base_model` without the language model head, the classification head (`Family.head_modules`) and
  poolers (`Family.body_excludes`), so a classifier and a generator of one base have the same fingerprint;
- names are relative to the body; tied tensors count once, under their first name;
- a tensor is the line `name dtype shape` (`layers.0.weight float32 64,64` and a newline), then its values, row by row,
  little-endian, in the dtype of the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from turret.families import Family, family_of
from turret.transformer import Model

FORMAT = 1
OF_CHECKPOINT = "turret_fingerprint"  # attribute of a model whose weights are not the checkpoint's, such as 4 bits
_BLOCK = 1 << 26  # bytes hashed at once


def fingerprint(model: Model) -> str:
    """The fingerprint of the weights of `model`, in their present dtype. The model must have no adapter attached.

    A base in 4 bits has the fingerprint of its checkpoint.
    """
    return fingerprint_of(model.named_parameters(), model)


def fingerprint_of(named: Iterable[tuple[str, Tensor]], model: Model) -> str:
    """The same. named: the model's own parameters, if an adapter has replaced some."""
    known = getattr(model, OF_CHECKPOINT, None)
    return known if isinstance(known, str) else hash_tensors(body_parameters(named, model, family_of(model.config)))


def body_parameters(named: Iterable[tuple[str, Tensor]], model: Model, family: Family) -> Iterator[tuple[str, Tensor]]:
    """The parameters in `named` that belong to the body, by their names relative to the body."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    excluded = (*family.beside_body, *family.body_excludes)
    for name, tensor in named:
        relative = name.removeprefix(prefix)
        if name.startswith(prefix) and not is_within(relative, excluded):
            yield relative, tensor


def hash_tensors(named: Iterable[tuple[str, Tensor | Callable[[], Tensor]]]) -> str:
    """`sha256:…` over names, dtypes, shapes and values, sorted by name. A function reads its tensor when it is due."""
    digest = hashlib.sha256()
    for name, each in sorted(named, key=lambda pair: pair[0]):
        tensor = each if isinstance(each, Tensor) else each()
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _BLOCK):
            digest.update(flat[start : start + _BLOCK].cpu().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether `name` is one of `modules` or a parameter inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
