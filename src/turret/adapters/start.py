"""Let a new adapter begin with the numbers of a finished one, instead of seeded ones.

What is trained afterwards answers, before its first step, exactly as the finished one does. Only what has the same
shape can be taken: the same layers and rank, the same number of virtual tokens, the same head. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from turret.adapters import through_peft
from turret.adapters.adapter import LORA_PREFIX, Adapter, prompt_names
from turret.adapters.attached import Attachment, attachment, device_of
from turret.adapters.lora import LoRAFactors
from turret.adapters.prefix import PrefixGroup, PrefixSlot, new_slot
from turret.errors import AdapterError
from turret.methods import Full, LoRA, Peft, Prefix


@torch.no_grad()
def start_from(model: object, adapter: Adapter, generator: torch.Generator | None = None) -> None:
    """Put the adapter's numbers where `attach` put seeded ones; raises AdapterError where they do not fit.

    generator: draws the reparametrisation of a prefix, which is trained anew around the numbers.
    """
    attached = attachment(model)
    method, given = attached.methods[1], adapter.method
    if given.kind != method.kind:
        raise AdapterError(f"it is a {given.kind}, and the method here is {method.kind}: name the same method.kind")
    if isinstance(method, Full):
        _fill(attached.full, {**adapter.tensors, **adapter.head})
        return
    if isinstance(method, Peft):
        assert attached.guest is not None
        if given != through_peft.finished(attached.guest.method):
            raise AdapterError("it has other settings of PEFT than the method here: set [method] as it has it")
        through_peft.fill(attached.guest, adapter.tensors)
    _fill(_heads(attached), adapter.head)
    if isinstance(method, LoRA):
        assert isinstance(given, LoRA)
        if method.init_lora_weights == "pissa":
            raise AdapterError(
                'init_lora_weights = "pissa" starts from the base\'s weights: leave it out, or init_from'
            )
        if (method.r, method.scaling) != (given.r, given.scaling):
            raise AdapterError(
                f"it has r {given.r} and scaling {given.scaling:g}, and the method here r {method.r} and scaling "
                f"{method.scaling:g}: set method.r and method.lora_alpha as it has them"
            )
        _fill(_factors(attached), adapter.tensors)
    elif isinstance(method, Prefix):
        _fill_prefix(model, attached, method, adapter.tensors, generator)


def _heads(attached: Attachment) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": parameter
        for path, module in attached.heads.items()
        for name, parameter in module.slots["1"].named_parameters()
    }


def _factors(attached: Attachment) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, layer in attached.linears.items():
        factors = layer.slots["1"]
        assert isinstance(factors, LoRAFactors)
        found[f"{LORA_PREFIX}{path}.lora_A.weight"] = factors.lora_A
        found[f"{LORA_PREFIX}{path}.lora_B.weight"] = factors.lora_B
    return found


def _fill_prefix(
    model: object, attached: Attachment, method: Prefix, values: Mapping[str, Tensor], generator: torch.Generator | None
) -> None:
    slot = attached.prefixes["1"]
    assert isinstance(slot, PrefixSlot)
    groups = {name: group for name, group in slot.groups.items() if isinstance(group, PrefixGroup)}
    names = prompt_names(list(groups))
    _require_same({names[name]: group.shape for name, group in groups.items()}, values)
    starts = {name: values[names[name]] for name in groups}
    attached.prefixes["1"] = new_slot(method, starts, generator).to(device_of(model))


def _fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    _require_same({name: tuple(each.shape) for name, each in parameters.items()}, values)
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _require_same(expected: Mapping[str, tuple[int, ...]], values: Mapping[str, Tensor]) -> None:
    if odd := sorted(set(expected) ^ set(values)):
        has = "has no" if odd[0] in expected else "has"
        raise AdapterError(f"it {has} {odd[0]}, unlike the method here: set [method] as it has it, and the same head")
    for name, shape in expected.items():
        if tuple(values[name].shape) != shape:
            raise AdapterError(
                f"its {name} has shape {tuple(values[name].shape)}, and here it is {shape}: set [method] as it has it"
            )
