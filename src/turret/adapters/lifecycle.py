"""An adapter's way onto a model and off it: begun anew or from another, read, put into a slot, taken out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turret.adapters.adapter import Adapter, Extracted, require_base
from turret.adapters.attached import ATTRIBUTE, Attachment, Beginning, attachment, detach, hook_model
from turret.errors import AdapterError
from turret.methods import Method
from turret.methods.lookup import numbers_of


def attach(
    model: Any,
    method: Method,
    *,
    init_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    head: tuple[str, ...] = (),
) -> Any:
    """Begin a new adapter on `model`, in slot 1, and return the same model: now an ordinary module that trains.

    init_ids: (n,) int64, token ids of the words a prefix starts from (repeated or cut to P); random words where left
    out. generator: draws the initial factors. head: dotted names of further modules to train as the head, such as a
    pooler that the checkpoint did not hold. Only the adapter and its head have requires_grad afterwards.
    """
    if isinstance(getattr(model, ATTRIBUTE, None), Attachment):
        raise AdapterError("this model already carries an adapter: call turret.detach(model) first")
    attached = hook_model(model, plain=method.wraps_modules)
    attached.methods[1] = method = method.on(attached.family.kind)
    try:
        numbers_of(method).start(model, attached, Beginning(init_ids, generator, head))
    except BaseException:
        detach(model)
        raise
    attached.context.active = 1
    return model


@torch.no_grad()
def start_from(model: object, adapter: Adapter, generator: torch.Generator | None = None) -> None:
    """Put a finished adapter's numbers where `attach` put seeded ones.

    What is trained afterwards answers, before its first step, exactly as the finished one does. Only the same shapes
    fit: the same layers and rank, the same number of virtual tokens, the same head; else AdapterError says what does
    not. generator: draws the reparametrisation of a prefix, which is trained anew around the numbers.
    """
    attached = attachment(model)
    method, given = attached.methods[1], adapter.method
    if given.kind != method.kind:
        raise AdapterError(f"it is a {given.kind}, and the method here is {method.kind}: name the same method.kind")
    numbers_of(method).fill(model, attached, adapter, generator)


def extract(model: Any, slot: int = 1) -> Extracted:
    """Copies of what a slot holds, on the CPU in float32. Raises AdapterError for an empty slot."""
    attached = attachment(model)
    if slot not in attached.methods:
        raise AdapterError(f"slot {slot} is empty: expected one of {sorted(attached.methods)}")
    return numbers_of(attached.methods[slot]).extract(attached, slot)


def mount(model: Any, adapter: Adapter, slot: int = 1, *, fingerprint: str | None = None) -> Any:
    """Put a finished adapter into a slot and make every row take it; returns the same model.

    fingerprint: that of the model's base; where given, an adapter of another base is refused (WrongBase). Every tensor
    must fit a layer of the model and every layer needs both factors, or AdapterError says which does not.
    """
    require_base(adapter, fingerprint)
    if slot < 1:
        raise AdapterError(f"slot {slot} cannot hold an adapter: slot 0 is the bare base; use 1 or more")
    attached = getattr(model, ATTRIBUTE, None) or hook_model(model, plain=adapter.method.wraps_modules)
    unmount(model, slot)
    numbers_of(adapter.method).mount(model, attached, adapter, slot)
    attached.methods[slot] = adapter.method
    attached.context.active = slot
    return model


def unmount(model: Any, slot: int) -> None:
    """Empty a slot; nothing happens where it is empty already."""
    attached = attachment(model)
    key = str(slot)
    if attached.guest is not None and slot in attached.methods:
        attached.guest.leave()
        attached.guest = None
    slots = [linear.slots for linear in attached.linears.values()] + [head.slots for head in attached.heads.values()]
    for each in slots:
        if key in each:
            del each[key]
    if key in attached.prefixes:
        del attached.prefixes[key]
    attached.methods.pop(slot, None)
    if attached.context.active == slot:
        attached.context.active = 0
