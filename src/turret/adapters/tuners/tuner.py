"""The protocol of a method's tensors: how they start on a base, how they are stored, and how they are mounted.

The defaults here are those of `head`; a method overrides what differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from turret.adapters.adapter import (
    LORA_PREFIX,
    Adapter,
    Extracted,
    Parts,
    check_head,
    cpu_copy,
    head_paths,
    shared_names,
)
from turret.adapters.batch_context import ATTACHED
from turret.adapters.hooks import (
    AdapterInit,
    HookedModel,
    device_of,
    routed_linear,
    routed_module,
    routed_whole,
    start_head,
)
from turret.adapters.layers import merged_values, shallow_copy_module
from turret.adapters.lora import LoRAFactors, ScaledLayer
from turret.adapters.prefix import PrefixGroup, PrefixSlot
from turret.errors import AdapterError, BundleError
from turret.json_types import JsonObject
from turret.manifest import AdapterConfig, check_agreement, check_config
from turret.methods.method import Check, Method
from turret.transformer import Model

M = TypeVar("M", bound=Method, covariant=True)


class Tuner(Generic[M]):
    """The tensors of one method on an attached model."""

    def __init__(self, method: M) -> None:
        self.method = method

    def require_known(self) -> None:
        """Raises RecipeError for settings that a library does not accept. Only libraries know such settings."""

    def targets(self, model: Model) -> Check:
        """A row of a plan: what is trained on this base, or that the base has no such layers."""
        return Check("method", "ok", self.method.summary)

    def start(self, model: Model, attached: HookedModel, beginning: AdapterInit) -> None:
        """Put a new adapter on a hooked model, with requires_grad on what is trained. See `adapters.attach`."""
        start_head(model, attached, beginning.head)

    def tensors(self, attached: HookedModel, slot: int) -> dict[str, Tensor]:
        """The tensors in a slot without the head, by the names that are stored."""
        return {}

    def extract(self, attached: HookedModel, slot: int) -> Extracted:
        """Copies of the tensors in a slot, on the CPU in float32."""
        tensors = {name: cpu_copy(value) for name, value in self.tensors(attached, slot).items()}
        return Extracted(tensors, head_tensors(attached, slot), self.method)

    def fill(self, model: Model, attached: HookedModel, adapter: Adapter, generator: torch.Generator | None) -> None:
        """Replace the values that `start` set by a stored adapter's. Raises AdapterError if they do not fit.

        generator: draws what is not stored, such as a prefix's MLP.
        """
        fill_parameters(head_parameters(attached), adapter.head)
        fill_parameters(self.tensors(attached, 1), adapter.tensors)

    def owns(self, name: str) -> bool:
        """Whether a tensor of a file belongs to the method, not to the head."""
        return False

    def stored_tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """The tensors of a bundle by their names in the file."""
        return {**adapter.tensors, **{f"{LORA_PREFIX}{name}": value for name, value in adapter.head.items()}}

    def read(self, tensors: dict[str, Tensor], config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The inverse of `stored_tensors`: (the method's tensors, the head's by their names in the model)."""
        own: dict[str, Tensor] = {}
        head: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if self.owns(name):
                own[name] = value
            elif name.startswith(LORA_PREFIX):
                head[name.removeprefix(LORA_PREFIX)] = value
            elif name.startswith("base_model."):
                head[name.removeprefix("base_model.")] = value  # PEFT's name for the head of a prompt-tuned model
            else:
                kind = self.method.kind
                raise BundleError(
                    f"tensor {name!r} belongs neither to the method {kind} nor to a head: export it again"
                )
        return own, head

    def peft_words(self) -> JsonObject:
        """The keys of PEFT's configuration that must agree with the settings, so that PEFT computes the same."""
        return {"peft_type": self.method.peft_name}

    def peft_config(self, adapter: Adapter) -> AdapterConfig:
        """The method's part of PEFT's configuration."""
        return self.peft_words()

    def check_config(self, config: AdapterConfig) -> None:
        """Raises BundleError if PEFT's configuration in a bundle contradicts the method in its manifest."""
        check_config(config)
        check_agreement(config, self.peft_words())

    def rate_ratios(self, names: Iterable[str]) -> dict[str, float]:
        """Factors on the learning rate, by name of the trained parameter; 1 for those that are not named."""
        return {}

    def combine_adapters(
        self, model: Model, given: Sequence[Adapter], weights: Sequence[float], how: str, density: float, seed: int
    ) -> tuple[Method, dict[str, Tensor]]:
        """Merge several adapters into one.

        Args:
            weights: one for each adapter.
            how: see `tuners/lora.py`.
            density: the share of values that a pruning merge keeps.
            seed: for the values that are dropped at random.

        Raises:
            AdapterError: adapters of this method cannot be merged.
        """
        kind = self.method.kind
        raise AdapterError(f"adapters of {kind} cannot be merged with one another: expected LoRA, which PEFT merges")

    def require_mergeable(self) -> None:
        """Raises AdapterError if the method is not a change of weights."""

    def merged_weights(self, model: Model, adapter: Adapter) -> dict[str, Tensor]:
        """The weights that the adapter changes, merged, by their names in a model with nothing attached."""
        shared, parts = shared_names(model), self.parts(model, adapter)
        lora = {path: ScaledLayer((A, B.float() * parts.scaling)) for path, (A, B) in parts.factors.items()}
        merged: dict[str, Tensor] = {}
        for path, change in (lora | dict(parts.layers)).items():
            if len(shared.get(f"{path}.weight", ())) > 1:
                raise AdapterError(f"{path} shares its weight with another layer, so the adapter cannot be merged")
            assert isinstance(change, ScaledLayer)  # PEFT merges its own modules
            own = change.merged_parameters(model.get_submodule(path))
            merged |= {f"{path}.{name}": value for name, value in own.items()}
        for path, module in parts.whole.items():
            base = model.get_submodule(path)
            own = merged_values(module, base.get_parameter("weight"))
            for name in shared.get(f"{path}.weight", ()):
                if (other := name.removesuffix(".weight")) not in parts.whole:
                    raise AdapterError(f"{path} shares its weight with {other}, so the adapter cannot be merged")
                if not torch.equal(own["weight"], merged_values(parts.whole[other], own["weight"])["weight"]):
                    raise AdapterError(f"{path} and {other} share one weight in the base, so they cannot be merged")
            merged |= {f"{path}.{name}": value for name, value in own.items()}
        return merged

    def parts(self, model: Model, adapter: Adapter) -> Parts:
        """The low-rank factors and the prefix with which a batch of many adapters computes this one.

        Raises:
            AdapterError: the tensors do not fit the model, or the method cannot share a base.
        """
        if adapter.tensors:
            names = ", ".join(sorted(adapter.tensors)[:3])
            raise AdapterError(f"the method {self.method.kind} has no tensors besides the head, given {names}")
        return Parts()

    def why_unserved(self, model: Model, adapter: Adapter) -> str | None:
        """Why an engine cannot take the adapter, if only its tensors show that; None if it can. model: the base."""
        return None

    def mount(self, model: Model, attached: HookedModel, adapter: Adapter, slot: int) -> None:
        """Put a finished adapter into an empty slot."""
        mount_parts(model, attached, self.parts(model, adapter), slot)
        mount_head(model, attached, adapter.head, slot)


def head_parameters(attached: HookedModel) -> dict[str, Tensor]:
    """The trained head, by names in the model."""
    return {
        f"{path}.{name}": parameter
        for path, module in attached.heads.items()
        for name, parameter in module.slots[str(ATTACHED)].named_parameters()
    }


def fill_parameters(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy the values into the parameters. Raises AdapterError unless names and shapes are equal."""
    require_same({name: tuple(each.shape) for name, each in parameters.items()}, values)
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def require_same(expected: Mapping[str, tuple[int, ...]], values: Mapping[str, Tensor]) -> None:
    """Raises AdapterError unless the values have these names and shapes."""
    if odd := sorted(set(expected) ^ set(values)):
        has = "has no" if odd[0] in expected else "has"
        raise AdapterError(f"it {has} {odd[0]}, unlike this recipe: set [method] and the head to its values")
    for name, shape in expected.items():
        if tuple(values[name].shape) != shape:
            raise AdapterError(
                f"its {name} has shape {tuple(values[name].shape)}, expected {shape}: set [method] to its values"
            )


def tuner_of(method: Method) -> Tuner[Method]:
    """The tensors of this method: an instance of the class that `tuner_at` names."""
    module, _, name = method.tuner_at.partition(":")
    tuner: type[Tuner[Method]] = getattr(import_module(module), name)
    return tuner(method)


# --- parts in a slot --------------------------------------------------------------------------------------------------


def head_tensors(attached: HookedModel, slot: int) -> dict[str, Tensor]:
    """Copies of the head in a slot, by its names in the model."""
    return {
        f"{path}.{name}": cpu_copy(value)
        for path, module in attached.heads.items()
        if str(slot) in module.slots
        for name, value in module.slots[str(slot)].state_dict().items()
    }


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


def filled_head(module: nn.Module, path: str, values: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A frozen float32 copy of a head module with these values."""
    check_head(module, path, values)
    made = shallow_copy_module(module)
    for key, value in values.items():
        owner, name = made.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        setattr(owner, name, nn.Parameter(value.float().clone().to(device), requires_grad=False))
        if isinstance(owner, nn.Linear) and name == "weight":
            owner.out_features = value.shape[0]
    return made


# --- composition ------------------------------------------------------------------------------------------------------
# Several adapters on one row: their low-rank changes are added, and the prefix of one is in front.
#
#     y = W x + sum_i s_i B_i A_i x
#
# The sum is one adapter of rank R_1 + R_2 + ...: A stacked by rows, and s_i B_i by columns. Source: "cat" of PEFT's
# `add_weighted_adapter`.


def all_parts(model: Model, adapter: Adapter) -> Parts:
    """The parts of an adapter together with those that it is composed with.

    Args:
        model: an attached model.

    Raises:
        AdapterError: the tensors do not fit the model, or the adapters cannot be composed.
    """
    every = (adapter, *adapter.others)
    if adapter.others and any(each.head for each in every):
        raise AdapterError("one of the composed adapters has a head: only adapters that generate can be composed")
    return compose_parts([tuner_of(each.method).parts(model, each) for each in every])


def compose_parts(parts: Sequence[Parts]) -> Parts:
    """The parts of all adapters as those of one. A single one is returned as it is.

    Raises:
        AdapterError: One of several scales layers or replaces modules, or two have a prefix.
    """
    if len(parts) == 1:
        return parts[0]
    if any(each.layers or each.whole for each in parts):
        raise AdapterError(
            "only LoRAs and one prefix can be composed, and one of these scales layers or replaces modules"
        )
    prefixes = [each.prefix for each in parts if each.prefix]
    if len(prefixes) > 1:
        raise AdapterError(f"{len(prefixes)} of the composed adapters have a prefix: expected at most one")
    factors = [each for each in parts if each.factors]
    ranks = [next(iter(each.factors.values()))[0].shape[0] for each in factors]
    paths = dict.fromkeys(path for each in factors for path in each.factors)
    return Parts({path: _stack_factors(path, factors, ranks) for path in paths}, 1.0, prefixes[0] if prefixes else {})


def _stack_factors(path: str, parts: Sequence[Parts], ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A (R, D_in) and B (D_out, R) of one layer, with zeros for adapters that leave it as it is. ranks: of each."""
    known = next(each.factors[path] for each in parts if path in each.factors)
    d_in, d_out = known[0].shape[1], known[1].shape[0]
    A, B = [], []
    for each, rank in zip(parts, ranks, strict=True):
        own = each.factors.get(path)
        A.append(torch.zeros(rank, d_in) if own is None else own[0].float())
        B.append(torch.zeros(d_out, rank) if own is None else own[1].float() * each.scaling)
    return torch.cat(A).contiguous(), torch.cat(B, dim=1).contiguous()
