"""The tensors of a method: how it starts on a base, what is stored of it, and how that comes back into a slot.

The answers here hold for every method that does not give its own; they are those of `head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from turret.adapters.adapter import (
    LORA_PREFIX,
    Adapter,
    Extracted,
    Parts,
    copied,
    head_tensors,
    mount_head,
    mount_parts,
    shared_names,
)
from turret.adapters.attached import Attachment, Beginning, start_head
from turret.adapters.lora import merged_weight
from turret.adapters.peft_config import check_agreement, check_config
from turret.errors import AdapterError, BundleError
from turret.methods.method import Method
from turret.plan_check import Check

M = TypeVar("M", bound=Method, covariant=True)


class MethodNumbers(Generic[M]):
    """What a method does with tensors on an attached model."""

    def __init__(self, method: M) -> None:
        self.method = method

    def require_known(self) -> None:
        """Raises RecipeError for settings that only a library can judge."""

    def targets(self, model: Any) -> Check:
        """A row of a plan: what is trained on this base, or that it has no such layers."""
        return Check("method", "ok", self.method.summary)

    def start(self, model: Any, attached: Attachment, beginning: Beginning) -> None:
        """Put a new adapter into slot 1, with requires_grad on whatever is trained; see `adapters.attach`."""
        start_head(model, attached, beginning.head)

    def tensors(self, attached: Attachment, slot: int) -> dict[str, Tensor]:
        """What a slot holds beside the head, by the names that are stored."""
        return {}

    def extract(self, attached: Attachment, slot: int) -> Extracted:
        """Copies of what a slot holds, on the CPU in float32."""
        tensors = {name: copied(value) for name, value in self.tensors(attached, slot).items()}
        return Extracted(tensors, head_tensors(attached, slot), self.method)

    def fill(self, model: Any, attached: Attachment, adapter: Adapter, generator: torch.Generator | None) -> None:
        """Put a stored adapter's numbers where `start` put new ones. Raises AdapterError where they do not fit."""
        fill_parameters(head_parameters(attached), adapter.head)
        fill_parameters(self.tensors(attached, 1), adapter.tensors)

    def owns(self, name: str) -> bool:
        """Whether a tensor of a file is the method's, and not the head's."""
        return False

    def stored(self, adapter: Adapter) -> dict[str, Tensor]:
        """Every tensor of a bundle by its name in the file."""
        return {**adapter.tensors, **{f"{LORA_PREFIX}{name}": value for name, value in adapter.head.items()}}

    def read(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The other way: the method's own tensors of a file, and the head's under their names in the model."""
        own: dict[str, Tensor] = {}
        head: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if self.owns(name):
                own[name] = value
            elif name.startswith(LORA_PREFIX):
                head[name.removeprefix(LORA_PREFIX)] = value
            elif name.startswith("base_model."):
                head[name.removeprefix("base_model.")] = value  # as PEFT names the head of a prompt-tuned model
            else:
                kind = self.method.kind
                raise BundleError(f"tensor {name!r} belongs neither to a {kind} nor to a head: export it again")
        return own, head

    def peft_words(self) -> dict[str, Any]:
        """What PEFT's configuration must say of the settings, so that PEFT computes the same."""
        return {"peft_type": self.method.peft_name}

    def peft_config(self, adapter: Adapter) -> dict[str, Any]:
        """The method's part of PEFT's configuration."""
        return self.peft_words()

    def check_config(self, config: dict[str, Any]) -> None:
        """Raises BundleError for a configuration beside a manifest that says another thing than the method."""
        check_config(config)
        check_agreement(config, self.peft_words())

    def require_mergeable(self) -> None:
        """Raises AdapterError for a method that no weights can say."""

    def merged(self, model: Any, adapter: Adapter) -> dict[str, Tensor]:
        """The weights that change, by name: those of a model with nothing attached, with the adapter in them."""
        shared, parts = shared_names(model), self.parts(model, adapter)
        merged = {}
        for path, (A, B) in parts.factors.items():
            if len(shared.get(f"{path}.weight", ())) > 1:
                raise AdapterError(f"{path} shares its weight with another layer: it cannot be merged into one alone")
            layer = model.get_submodule(path)
            transposed = not isinstance(layer, nn.Linear)
            merged[f"{path}.weight"] = merged_weight(layer.weight, A, B, parts.scaling, transposed=transposed)
        return merged

    def parts(self, model: Any, adapter: Adapter) -> Parts:
        """What an adapter adds in the two hooks: in a batch of many adapters it is this and the head.

        Raises AdapterError for tensors that do not fit, and for a method that answers alone.
        """
        if adapter.tensors:
            odd = ", ".join(sorted(adapter.tensors)[:3])
            raise AdapterError(f"a {self.method.kind} holds no other tensors, given {odd}")
        return Parts()

    def mount(self, model: Any, attached: Attachment, adapter: Adapter, slot: int) -> None:
        """Put a finished adapter into an empty slot."""
        mount_parts(model, attached, self.parts(model, adapter), slot)
        mount_head(model, attached, adapter.head, slot)


def head_parameters(attached: Attachment) -> dict[str, Tensor]:
    """The head in slot 1, by names in the model."""
    return {
        f"{path}.{name}": parameter
        for path, module in attached.heads.items()
        for name, parameter in module.slots["1"].named_parameters()
    }


def fill_parameters(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy the values; raises AdapterError unless every one has its parameter, of the same shape."""
    require_same({name: tuple(each.shape) for name, each in parameters.items()}, values)
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def require_same(expected: Mapping[str, tuple[int, ...]], values: Mapping[str, Tensor]) -> None:
    """Raises AdapterError unless the values have these names and shapes."""
    if odd := sorted(set(expected) ^ set(values)):
        has = "has no" if odd[0] in expected else "has"
        raise AdapterError(f"it {has} {odd[0]}, unlike the method here: set [method] as it has it, and the same head")
    for name, shape in expected.items():
        if tuple(values[name].shape) != shape:
            raise AdapterError(
                f"its {name} has shape {tuple(values[name].shape)}, and here it is {shape}: set [method] as it has it"
            )
