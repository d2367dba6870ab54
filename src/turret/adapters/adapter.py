"""One adapter as tensors and settings, and the parts of it that the hooks read: low-rank factors, a prefix, a head.

The tuner of a method reads and checks its tensors and puts them into a slot; `lifecycle` has the verbs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from turret.adapters.lora import LayerChange
from turret.errors import AdapterError, WrongBase
from turret.families import FAMILIES
from turret.families.family import Family
from turret.manifest import Lineage
from turret.methods import Method
from turret.methods.peft import LORA_PREFIX as LORA_PREFIX
from turret.tasks.shapes import Generation, TaskSpec

PROMPT = {"decoder": "prompt_embeddings", "encoder": "encoder_prompt_embeddings", "cross": "cross_prompt_embeddings"}


@dataclass(frozen=True)
class BaseInfo:
    """The base that an adapter was trained on. The fingerprint identifies it; the id says where to find it."""

    id: str
    fingerprint: str | None = None
    family: str | None = None
    revision: str | None = None
    quantization: str | None = None  # how its weights were packed during training; None: they were plain


@dataclass(frozen=True)
class Adapter:
    """What a training makes and a bundle holds.

    Args:
        method: its settings.
        tensors: by PEFT's names, on the CPU; a prefix is (L, 2, H, P, D).
        head: by their names in the model, on the CPU.
        base: that it was trained on.
        task: what answering needs: kind, labels, max_tokens, …
        generation: settings of `generate()`.
        lineage: recipe, data digest, seed, library versions, …
        others: adapters that it is composed with on one row; never stored.
    """

    method: Method
    tensors: dict[str, Tensor]
    head: dict[str, Tensor]
    base: BaseInfo
    task: TaskSpec = field(default_factory=TaskSpec)
    generation: Generation = field(default_factory=Generation)
    lineage: Lineage = field(default_factory=Lineage)
    others: tuple[Adapter, ...] = ()

    @property
    def head_modules(self) -> list[str]:
        """The paths of the modules that hold the head's tensors."""
        family, paths = FAMILIES.get(self.base.family or ""), set[str]()
        parts = () if family is None else family.body_excludes
        for name in self.head:
            inside = next((part for part in parts if f".{part}." in name), None)  # such as a pooler
            paths.add(name.split(".")[0] if inside is None else f"{name.split(f'.{inside}.')[0]}.{inside}")
        return sorted(paths)


@dataclass(frozen=True)
class StoredAdapter:
    """A stored version in memory."""

    version: str  # "sentiment@2"
    digest: str  # of its content
    adapter: Adapter


class Extracted(NamedTuple):
    """The tensors of one slot, and the method as it is stored: PiSSA becomes plain LoRA of twice the rank."""

    tensors: dict[str, Tensor]
    head: dict[str, Tensor]
    method: Method


@dataclass(frozen=True)
class Parts:
    """What an adapter adds in the two hooks, apart from its head.

    Args:
        factors: A (R, D_in) and B (D_out, R), all of one rank, by the path of a linear layer.
        scaling: of all factors.
        prefix: keys and values (L, 2, H, P, D), by group of attention layers.
        layers: what a method that does more than add low-rank factors does to a linear layer, by its path.
        whole: modules that replace norms, embeddings or the output layer, by path.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scaling: float = 1.0
    prefix: dict[str, Tensor] = field(default_factory=dict)
    layers: Mapping[str, LayerChange] = field(default_factory=dict)
    whole: dict[str, nn.Module] = field(default_factory=dict)


def require_base(adapter: Adapter, fingerprint: str | None) -> None:
    """Raise WrongBase for an adapter of another base. Without both fingerprints nothing is compared."""
    if fingerprint and adapter.base.fingerprint and fingerprint != adapter.base.fingerprint:
        raise WrongBase(
            f"adapter was trained on base {adapter.base.fingerprint[:19]} ({adapter.base.id}), this model is "
            f"{fingerprint[:19]}: load that base, or retrain"
        )


def head_paths(family: Family, head: dict[str, Tensor]) -> list[str]:
    """The modules of a head's tensors: the family's head modules, and poolers inside the body."""
    paths: list[str] = []
    for key in head:
        path = next((name for name in family.head_modules if key.startswith(name + ".")), None)
        if path is None:
            at = next((key.find(f".{part}.") for part in family.body_excludes if f".{part}." in key), -1)
            if at < 0:
                raise AdapterError(f"tensor {key!r} belongs to no head of {family.name}: remove it or retrain")
            path = key[: key.index(".", at + 1)]
        if path not in paths:
            paths.append(path)
    return paths


def check_head(module: nn.Module, path: str, values: Mapping[str, Tensor]) -> None:
    """Raise AdapterError unless the values are the module's tensors. A linear layer may have any number of outputs."""
    expected = module.state_dict()
    if set(values) != set(expected):
        raise AdapterError(f"head {path} needs {', '.join(sorted(expected))}, given {', '.join(sorted(values))}")
    for key, value in values.items():
        old, last = expected[key], isinstance(module.get_submodule(key.rpartition(".")[0]), nn.Linear)
        if value.dim() != old.dim() or value.shape[1:] != old.shape[1:] or (not last and value.shape != old.shape):
            raise AdapterError(f"head {path}.{key} has shape {tuple(value.shape)}: expected {tuple(old.shape)}")


def cpu_copy(value: Tensor) -> Tensor:
    """A copy on the CPU; in float32 if it is a floating-point tensor."""
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous().clone()


def rename_paths(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The same tensors, with another start of the paths of their layers."""
    start = f"{LORA_PREFIX}{old}"
    return {
        f"{LORA_PREFIX}{new}{name.removeprefix(start)}" if name.startswith(start) else name: value
        for name, value in tensors.items()
    }


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum proves it in one fast pass."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each parameter, by each of its names."""
    names: dict[int, list[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(each), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}
