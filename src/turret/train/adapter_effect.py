"""Checks that an adapter changes its base's outputs, and that every one of its tensors affects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from turret import adapters
from turret.adapters import Adapter
from turret.bases import Base
from turret.families.family import Pooling
from turret.methods import Head
from turret.train.proof import answer
from turret.transformer import Model


@dataclass(frozen=True)
class AdapterEffect:
    """An adapter's outputs, compared with the bare base's.

    Args:
        outputs: (B, C) or (N, V), float32.
        effect: largest difference from the base's outputs, divided by the largest output.
        idle: names of the tensors that do not affect the outputs.
    """

    outputs: Tensor
    effect: float
    idle: list[str]

    def problem(self) -> str | None:
        """What is wrong, as the end of a sentence about the adapter; None if nothing is."""
        if not bool(torch.isfinite(self.outputs).all()):
            return "its outputs are not finite numbers"
        if not self.effect > 0:
            return "its outputs equal the bare base's: the adapter has no effect; train longer"
        if self.idle:
            return f"{len(self.idle)} of its tensors do not affect the outputs, the first is {self.idle[0]}"
        return None


def effect_of(base: Base, adapter: Adapter, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> AdapterEffect:
    """Compare the outputs of a bare base with and without an adapter, which stays mounted.

    Args:
        base: a base with no adapter on it.
        sources: token ids (T,) of each row.
        targets: token ids of each row's target; empty for a classifier.

    Raises:
        AdapterError: a tensor does not fit the base.
        WrongBase: the adapter belongs to another base.
    """
    model: Model = base.model
    sources, targets = list(sources), list(targets)
    with torch.inference_mode(False), torch.enable_grad():  # the caller may be in either mode
        with torch.no_grad():
            bare = _bare_outputs(model, adapter, sources, targets)
            adapters.mount(model, adapter, fingerprint=base.fingerprint)
            # name the slot, as for the bare base: both round alike
            outputs = answer(model, sources, targets, 1, _pooling(adapter))
        effect = float((outputs - bare).abs().max()) / float(outputs.abs().max().clamp_min(1e-30))
        return AdapterEffect(outputs, effect, _idle(model, adapter, sources, targets))


def _bare_outputs(model: Model, adapter: Adapter, sources: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The base's outputs without the adapter's tensors; with its head, unless the head is all it has."""
    if adapter.head and adapter.tensors and not adapter.method.every_weight:
        adapters.mount(model, replace(adapter, method=Head(), tensors={}))
        slot = 1
    else:
        adapters.attach(model, Head())
        slot = 0
    try:
        return answer(model, sources, targets, slot, _pooling(adapter))
    finally:
        adapters.detach(model)
        model.eval()


def _idle(model: Model, adapter: Adapter, sources: list[Tensor], targets: list[Tensor]) -> list[str]:
    """The stored tensors that were not mounted; if all were, those that have no gradient from the outputs."""
    mounted = adapters.extract(model)
    stored, present = {**adapter.tensors, **adapter.head}, {**mounted.tensors, **mounted.head}
    lost = [
        name for name in stored if name not in present or not torch.equal(stored[name].float(), present[name].float())
    ]
    if lost or adapter.method.every_weight:  # full fine-tuning also copies weights that the task does not use
        return lost
    owned = _slot_parameters(model)
    for parameter in owned.values():
        parameter.requires_grad_(True)
    total = answer(model, sources, targets, pooling=_pooling(adapter)).square().sum()
    gradients = torch.autograd.grad(total, list(owned.values()), allow_unused=True)
    return [name for name, gradient in zip(owned, gradients, strict=True) if gradient is None]


def _pooling(adapter: Adapter) -> Pooling | None:
    """Of an adapter whose outputs are vectors."""
    found: Pooling | None = adapter.task.get("pooling")
    return found


def _slot_parameters(model: Model) -> dict[str, Tensor]:
    """The numbers of the attached adapter, by their path."""
    attached, slot = adapters.attachment(model), str(adapters.ATTACHED)
    if attached.guest is not None:
        heads = {path: each.slots[slot] for path, each in attached.heads.items() if slot in each.slots}
        own = {f"{path}.{name}": each for path, part in heads.items() for name, each in part.named_parameters()}
        found: dict[str, Tensor] = {**attached.guest.parameters, **own}
        return found
    parts: dict[str, nn.Module] = {f"prefix.{name}": each for name, each in attached.prefixes.items()}
    for routed in (attached.linears, attached.heads, attached.wholes):
        parts |= {path: each.slots[slot] for path, each in routed.items() if slot in each.slots}
    scaling = {path: layer.scaled.get(adapters.ATTACHED) for path, layer in attached.linears.items()}
    scaled = {path: layer.tensors for path, layer in scaling.items() if layer is not None}
    return {
        **{f"{path}.{name}": each for path, part in parts.items() for name, each in part.named_parameters()},
        **{f"{path}.{number}": each for path, own in scaled.items() for number, each in enumerate(own)},
    }
