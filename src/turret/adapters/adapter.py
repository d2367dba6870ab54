"""One adapter as tensors and settings, and its parts in a slot: low-rank factors, a prefix, a head.

The `numbers` of a method read and check its tensors; `lifecycle` has the verbs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from turret.adapters.hooks import (
    ATTRIBUTE,
    HookedModel,
    device_of,
    routed_linear,
    routed_module,
    routed_whole,
)
from turret.adapters.lora import LoRAFactors
from turret.adapters.modules_to_save import twin
from turret.adapters.prefix import PrefixGroup, PrefixSlot
from turret.adapters.scaled import LayerChange
from turret.errors import AdapterError, WrongBase
from turret.families import FAMILIES
from turret.families.family import Family
from turret.manifest import Lineage
from turret.methods import Method
from turret.methods.peft import LORA_PREFIX as LORA_PREFIX
from turret.tasks.shapes import Generation, TaskSpec
from turret.transformer import Model

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


def head_tensors(attached: HookedModel, slot: int) -> dict[str, Tensor]:
    """Copies of the head in a slot, by its names in the model."""
    return {
        f"{path}.{name}": copied(value)
        for path, module in attached.heads.items()
        if str(slot) in module.slots
        for name, value in module.slots[str(slot)].state_dict().items()
    }


def require_base(adapter: Adapter, fingerprint: str | None) -> None:
    """Raise WrongBase for an adapter of another base. Without both fingerprints nothing is compared."""
    if fingerprint and adapter.base.fingerprint and fingerprint != adapter.base.fingerprint:
        raise WrongBase(
            f"adapter was trained on base {adapter.base.fingerprint[:19]} ({adapter.base.id}), this model is "
            f"{fingerprint[:19]}: load that base, or retrain"
        )


def mount_parts(model: Model, attached: HookedModel, parts: Parts, slot: int) -> None:
    """Put frozen factors and a frozen prefix into a slot."""
    for path, (A, B) in parts.factors.items():
        factors = LoRAFactors(A.float().clone(), B.float().clone(), parts.scaling).requires_grad_(False)
        layer = routed_linear(model, attached, path)
        layer.slots[str(slot)] = factors.to(device_of(layer.base_layer)).eval()
    for path, scaled in parts.layers.items():
        layer = routed_linear(model, attached, path)
        layer.scaled[slot] = scaled.to(device_of(layer.base_layer))
    for path, module in parts.whole.items():
        routed_whole(model, attached, path).slots[str(slot)] = module.requires_grad_(False).eval()
    if parts.prefix:
        groups = {name: PrefixGroup(each, None, None) for name, each in parts.prefix.items()}
        attached.prefixes[str(slot)] = PrefixSlot(groups).requires_grad_(False).to(device_of(model)).eval()


def linear_at(model: Model, path: str) -> nn.Module:
    """The base's own layer at a path. Raises AdapterError if there is none."""
    attached: HookedModel | None = getattr(model, ATTRIBUTE, None)
    if attached is not None and (known := attached.linears.get(path)) is not None:
        return known.base_layer  # faster than get_submodule, which walks the path
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(f"the base has no layer {path!r}: the adapter belongs to another architecture") from None
    layer = getattr(layer, "base_layer", layer)
    assert isinstance(layer, nn.Module)
    return layer


def mount_head(model: Model, attached: HookedModel, head: dict[str, Tensor], slot: int) -> None:
    """Put frozen copies of the head's modules into a slot; a classifier needs all of them."""
    required = [name for name in attached.family.head_modules if name in dict(model.named_children())]
    missing = [name for name in required if not any(key.startswith(name + ".") for key in head)]
    if missing:
        raise AdapterError(f"the adapter has no head {', '.join(missing)}, which a classifier needs: retrain")
    for path in head_paths(attached.family, head):
        module = attached.heads[path].base_module if path in attached.heads else model.get_submodule(path)
        values = {key[len(path) + 1 :]: value for key, value in head.items() if key.startswith(path + ".")}
        routed_module(model, attached, path).slots[str(slot)] = filled_head(module, path, values, device_of(module))


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


def filled_head(module: nn.Module, path: str, values: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A frozen float32 copy of a head module with these values."""
    check_head(module, path, values)
    made = twin(module)
    for key, value in values.items():
        owner, name = made.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        setattr(owner, name, nn.Parameter(value.float().clone().to(device), requires_grad=False))
        if isinstance(owner, nn.Linear) and name == "weight":
            owner.out_features = value.shape[0]
    return made


def copied(value: Tensor) -> Tensor:
    """A copy on the CPU; in float32 if it is a floating-point tensor."""
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous().clone()


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each parameter, by each of its names."""
    names: dict[int, list[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(each), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}
