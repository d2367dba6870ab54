"""What an adapter does to its base: its outputs beside the bare base's, and whether every tensor takes part in them.

Asks models, judges in half a sentence, and refuses to know files and where the adapter came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from turret import adapters
from turret.adapters import Adapter
from turret.methods import Head
from turret.train.proof import answer


@dataclass(frozen=True)
class AdapterEffect:
    """outputs: (B, C) or (N, V), float32; effect: how far they are from the bare base's, of the largest output."""

    outputs: Tensor
    effect: float
    idle: list[str]  # tensors that take no part

    def problem(self) -> str | None:
        """What is wrong, as the end of a sentence about the adapter, or None."""
        if not bool(torch.isfinite(self.outputs).all()):
            return "its outputs are not finite numbers"
        if not self.effect > 0:
            return "it gives exactly what the bare base gives: the adapter has no effect; train longer"
        if self.idle:
            return f"{len(self.idle)} of its tensors take no part in the outputs, the first is {self.idle[0]}"
        return None


def effect_of(base: Any, adapter: Adapter, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> AdapterEffect:
    """Mount the adapter on a base without any, and ask both about rows of token ids. It stays mounted, in slot 1.

    Raises AdapterError where a tensor does not fit, WrongBase for another base's adapter.
    """
    model, sources, targets = base.model, list(sources), list(targets)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in the middle of
        with torch.no_grad():
            bare = _without(model, adapter, sources, targets)
            adapters.mount(model, adapter, fingerprint=base.fingerprint)
            outputs = answer(model, sources, targets, 1)  # by slot, as the bare base is asked: or it rounds otherwise
        effect = float((outputs - bare).abs().max()) / float(outputs.abs().max().clamp_min(1e-30))
        return AdapterEffect(outputs, effect, _idle(model, adapter, sources, targets))


def _without(model: Any, adapter: Adapter, sources: list[Tensor], targets: list[Tensor]) -> Tensor:
    """What the base gives without the adapter: under the adapter's own head, where that is only a part of it."""
    if adapter.head and adapter.tensors and not adapter.method.every_weight:
        adapters.mount(model, replace(adapter, method=Head(), tensors={}))
        slot = 1
    else:
        adapters.attach(model, Head())
        slot = 0
    try:
        return answer(model, sources, targets, slot)
    finally:
        adapters.detach(model)
        model.eval()


def _idle(model: Any, adapter: Adapter, sources: list[Tensor], targets: list[Tensor]) -> list[str]:
    """Which stored tensors were not mounted, or else which mounted ones autograd does not find behind the outputs."""
    mounted = adapters.extract(model)
    stored, there = {**adapter.tensors, **adapter.head}, {**mounted.tensors, **mounted.head}
    lost = [name for name in stored if name not in there or not torch.equal(stored[name].float(), there[name].float())]
    if lost or adapter.method.every_weight:  # a full fine-tuning replaces also what a task does not use
        return lost
    owned = _owned(model)
    for parameter in owned.values():
        parameter.requires_grad_(True)
    total = answer(model, sources, targets).square().sum()
    gradients = torch.autograd.grad(total, list(owned.values()), allow_unused=True)
    return [name for name, gradient in zip(owned, gradients, strict=True) if gradient is None]


def _owned(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of slot 1, known by where they sit."""
    attached = adapters.attachment(model)
    if attached.guest is not None:
        heads = {path: each.slots["1"] for path, each in attached.heads.items() if "1" in each.slots}
        own = {f"{path}.{name}": each for path, part in heads.items() for name, each in part.named_parameters()}
        return {**attached.guest.parameters, **own}
    parts: dict[str, nn.Module] = {f"prefix.{name}": each for name, each in attached.prefixes.items()}
    routed: dict[str, Any] = {**attached.linears, **attached.heads}
    parts |= {path: each.slots["1"] for path, each in routed.items() if "1" in each.slots}
    return {f"{path}.{name}": each for path, part in parts.items() for name, each in part.named_parameters()}
