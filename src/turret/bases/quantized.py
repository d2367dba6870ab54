"""Load a base with quantized linear layers: by `base_quantization`, or from a quantized checkpoint.

With `nf4`, transformers reads one tensor after another and bitsandbytes packs it, so the plain weights are never in
memory together. The head, poolers and the output layer stay as they are. The fingerprint is that of the checkpoint: its
tensors are read once more, one at a time, unless the cache knows it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from turret import quantized
from turret.bases.fingerprints import body_parameters, hash_tensors, is_within
from turret.bases.source import BaseSource
from turret.errors import BaseModelError, require_package
from turret.families import Family
from turret.transformer import Model

Quantization = Literal["none", "nf4"]
QUANTIZATIONS: dict[str, Quantization] = {"none": "none", "nf4": "nf4"}
PACKAGES = {"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",)}  # that transformers needs to read such a base


class Loading(TypedDict, total=False):
    """Arguments of transformers' `from_pretrained`."""

    quantization_config: BitsAndBytesConfig
    device_map: dict[str, str]


def check_quantization(source: BaseSource, wanted: Quantization) -> str:
    """How the weights will be kept: `none`, `nf4`, or the method of a quantized checkpoint.

    Raises:
        BaseModelError: the checkpoint is quantized already, or a library is missing.
    """
    own = source.quantization
    if own is not None and wanted != "none":
        raise BaseModelError(
            f'base {source.id!r} is quantized already ({own}): leave base_quantization = "{wanted}" out, '
            "or give the original model"
        )
    if own in PACKAGES:
        if missing := [name for name in PACKAGES[own] if find_spec(name) is None]:
            raise BaseModelError(
                f"base {source.id!r} is quantized by {own}: transformers reads it with {' and '.join(PACKAGES[own])}; "
                f"run: pip install {' '.join(missing)}, or give the original model"
            )
        return own
    if own is not None or wanted != "none":
        _require_library(source, wanted if own is None else own)
    return wanted if own is None else own


def _require_library(source: BaseSource, kind: str) -> None:
    remedy = "pip install 'turret[quantized]', or give the original model with base_quantization none"
    with require_package(f"base {source.id!r} in {kind}", "bitsandbytes", remedy, BaseModelError):
        quantized.library()


def arguments(family: Family, kept: str, device: torch.device) -> Loading:
    """Further arguments of transformers' `from_pretrained`. device: of the base.

    A GPU packs the weights itself, one after another as they are read: seconds for what takes a CPU minutes. Weights of
    a family that is not listed are packed on the CPU, where its outputs are checked first.
    """
    if kept == "none":
        return {}
    if kept != "nf4":
        return {"device_map": {"": "cpu"}}
    inside = [rf"(.*\.)?{name}" for name in family.body_excludes]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=[*family.beside_body, *inside],
    )
    packs = "cpu" if family.guessed or device.type != "cuda" else str(device)
    return {"quantization_config": config, "device_map": {"": packs}}


def note(model: Model, kept: str) -> str:
    """How many layers are packed, and what the base takes in memory."""
    layers = sum(quantized.is_packed(each) for each in model.modules())
    return f"{layers} linear layers are kept in {kept}: the base takes {quantized.stored_bytes(model) / 1e6:.0f} MB"


class Checkpoint:
    """The tensors of a base's files, read one at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def key(self, name: str, prefix: str) -> str | None:
        """The key of a parameter of the body: its name with or without the body's prefix; None if it has another."""
        return next((key for key in (name, f"{prefix}.{name}") if key in self._files), None)

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        with safe_open(self._files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor if dtype is None else tensor.to(dtype)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """The rows [start, stop) of a tensor; nothing else of it is read."""
        with safe_open(self._files[key], framework="pt") as file:
            rows: Tensor = file.get_slice(key)[start:stop]
        return rows

    def shape(self, key: str) -> tuple[int, ...]:
        with safe_open(self._files[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())


def checkpoint_fingerprint(source: BaseSource, model: Model, family: Family) -> str | None:
    """The fingerprint of a checkpoint from its files; None if they name a tensor otherwise than the model does.

    Args:
        model: the base as it was loaded in 4 bits, before its dtype is changed.
    """
    checkpoint, prefix = Checkpoint(source.weights), model.base_model_prefix
    if source.quantization is not None:  # its own tensors, as they are
        excluded = (*family.beside_body, *family.body_excludes)
        names = {key.removeprefix(f"{prefix}."): key for key in checkpoint}
        kept = {name: key for name, key in names.items() if not is_within(name, excluded)}
        return hash_tensors((name, functools.partial(checkpoint.read, key)) for name, key in kept.items())
    readers = []
    for name, parameter in body_parameters(model.named_parameters(), model, family):
        key, state = checkpoint.key(name, prefix), quantized.state_of(parameter)
        shape, dtype = (parameter.shape, parameter.dtype) if state is None else (state.shape, state.dtype)
        if key is None or sorted(checkpoint.shape(key)) != sorted(shape):  # Conv1D's weight is turned
            return None
        readers.append((name, functools.partial(checkpoint.read, key, dtype)))
    return hash_tensors(readers)


def remember_originals(source: BaseSource, model: Model) -> None:
    """Let every layer in 4 bits read its weight in the checkpoint (`quantized.original_weight`)."""
    if source.quantization is not None:
        return
    checkpoint = Checkpoint(source.weights)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for path, layer in model.named_modules():
        if quantized.in_four_bits(layer):
            key = checkpoint.key(f"{path.removeprefix(prefix)}.weight", model.base_model_prefix)
            turned = getattr(layer, "source_cls", nn.Linear) is not nn.Linear  # transformers turns Conv1D's weight
            if key is not None:
                setattr(layer, quantized.ORIGINAL, functools.partial(_original, checkpoint, key, turned))


def _original(checkpoint: Checkpoint, key: str, turned: bool) -> Tensor:
    """A weight, (D_out, D_in)."""
    weight = checkpoint.read(key)
    return weight.mT if turned else weight
