"""Let a new adapter begin with the numbers of a finished one, instead of seeded ones.

What is trained afterwards answers, before its first step, exactly as the finished one does. Only what has the same
shape can be taken: the same layers and rank, the same number of virtual tokens, the same head. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from turret.adapters.adapter import Adapter
from turret.adapters.attached import Attachment, attachment
from turret.errors import AdapterError


@torch.no_grad()
def start_from(model: object, adapter: Adapter, generator: torch.Generator | None = None) -> None:
    """Put the adapter's numbers where `attach` put seeded ones; raises AdapterError where they do not fit.

    generator: draws the reparametrisation of a prefix, which is trained anew around the numbers.
    """
    attached = attachment(model)
    method, given = attached.methods[1], adapter.method
    if given.kind != method.kind:
        raise AdapterError(f"it is a {given.kind}, and the method here is {method.kind}: name the same method.kind")
    method.numbers.fill(model, attached, adapter, generator)


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
