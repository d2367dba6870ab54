"""The verbs of an adapter on a model: start a new one, fill it from another, extract it, mount and unmount it."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from turret.adapters.adapter import Adapter, Extracted, mount_parts, require_base
from turret.adapters.attached import ATTRIBUTE, Attachment, Beginning, attachment, detach, hook_model
from turret.adapters.composition import all_parts
from turret.arguments import checked
from turret.errors import AdapterError
from turret.methods import Method, by_name
from turret.methods.lookup import numbers_of
from turret.transformer import Model

M = TypeVar("M", bound=nn.Module)  # a model of transformers, by whatever class its user knows it


@checked
def attach(
    model: M,
    method: Method | str,
    *,
    init_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    head: tuple[str, ...] = (),
) -> M:
    """Start a new adapter on `model`, in slot 1. Only the adapter and its head require gradients afterwards.

    Args:
        model: a model of transformers without an attachment.
        method: what is trained: a method, or the name of one with its defaults, such as "lora" or "peft:IA3".
        init_ids: (n,) int64, token ids of the words that a prefix starts from, repeated or cut to P; None: random.
        generator: draws the initial factors.
        head: dotted names of further modules to train as the head, such as a pooler that the checkpoint lacks.

    Returns:
        The same model, now an ordinary module that trains.

    Raises:
        AdapterError: the model has an adapter already, or does not fit the method.
        RecipeError: there is no method of that name.
    """
    base = require_bare(model)
    method = by_name(method) if isinstance(method, str) else method
    attached = hook_model(base, plain=method.wraps_modules)
    attached.methods[1] = method = method.on(attached.family.kind)
    try:
        numbers_of(method).start(base, attached, Beginning(init_ids, generator, head))
    except BaseException:
        detach(model)
        raise
    attached.context.active = 1
    return model


def require_bare(model: nn.Module) -> Model:
    """The model, if it is one of transformers without an adapter. Raises AdapterError."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise AdapterError(
            f"an adapter goes on a model of transformers, given a {type(model).__name__}: load one with from_pretrained"
        )
    if isinstance(getattr(model, ATTRIBUTE, None), Attachment):
        raise AdapterError("this model already carries an adapter: call turret.detach(model) first")
    return cast(Model, model)


@torch.no_grad()
def start_from(model: Model, adapter: Adapter, generator: torch.Generator | None = None) -> None:
    """Put the tensors of a finished adapter where `attach` put seeded ones.

    Before its first step, the new adapter answers exactly as the finished one does.

    Args:
        model: a model on which `attach` started an adapter.
        adapter: one with the same layers, rank, number of virtual tokens and head.
        generator: draws the reparametrisation of a prefix, which is trained anew around its keys and values.

    Raises:
        AdapterError: the adapter does not fit.
    """
    attached = attachment(model)
    method, given = attached.methods[1], adapter.method
    if given.kind != method.kind:
        raise AdapterError(
            f"the adapter is a {given.kind} and the recipe trains {method.kind}: set method.kind to {given.kind}"
        )
    numbers_of(method).fill(model, attached, adapter, generator)


def extract(model: nn.Module, slot: int = 1) -> Extracted:
    """Copies of the tensors in a slot, on the CPU in float32. Raises AdapterError for an empty slot."""
    attached = attachment(model)
    if slot not in attached.methods:
        raise AdapterError(f"slot {slot} is empty: expected one of {sorted(attached.methods)}")
    return numbers_of(attached.methods[slot]).extract(attached, slot)


def mount(model: M, adapter: Adapter, slot: int = 1, *, fingerprint: str | None = None) -> M:
    """Put a finished adapter into a slot, and make every row take it.

    Args:
        model: its base.
        adapter: every tensor must fit a layer, and every layer needs both factors. Its `others` are mounted with it.
        slot: 1 or more; an adapter that is there is replaced.
        fingerprint: of the model's base; if given, an adapter of another base is refused.

    Returns:
        The same model.

    Raises:
        WrongBase: the adapter was trained on another base.
        AdapterError: the slot is 0, a tensor does not fit, or the adapters cannot be composed.
    """
    for each in (adapter, *adapter.others):
        require_base(each, fingerprint)
    if slot < 1:
        raise AdapterError(f"slot {slot} cannot hold an adapter: slot 0 is the bare base; use 1 or more")
    base = cast(Model, model)
    attached = getattr(model, ATTRIBUTE, None) or hook_model(base, plain=adapter.method.wraps_modules)
    unmount(model, slot)
    if adapter.others:
        mount_parts(base, attached, all_parts(base, adapter), slot)
    else:
        numbers_of(adapter.method).mount(base, attached, adapter, slot)
    attached.methods[slot] = adapter.method
    attached.context.active = slot
    return model


def unmount(model: nn.Module, slot: int) -> None:
    """Empty a slot. An empty slot stays empty."""
    attached = attachment(model)
    key = str(slot)
    if attached.guest is not None and slot in attached.methods:
        attached.guest.leave()
        attached.guest = None
    for routed in (attached.linears, attached.heads, attached.wholes):
        for module in routed.values():
            if key in module.slots:
                del module.slots[key]
    for linear in attached.linears.values():
        linear.scaled.pop(slot, None)
    attached.stored.pop(slot, None)
    if key in attached.prefixes:
        del attached.prefixes[key]
    attached.methods.pop(slot, None)
    if attached.context.active == slot:
        attached.context.active = 0
