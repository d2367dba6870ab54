"""The verbs of an adapter on a model: start a new one, fill it from another, extract it, mount and unmount it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turret import quantized
from turret.adapters.adapter import Adapter, Extracted, require_base, shared_names
from turret.adapters.batch_context import ATTACHED, BatchContext, drawing_alone
from turret.adapters.hooks import (
    ATTRIBUTE,
    AdapterInit,
    attachment,
    detach,
    hook_model,
    layer_paths,
    require_bare,
)
from turret.adapters.layers import NORMED
from turret.adapters.tuners.tuner import all_parts, mount_parts, tuner_of
from turret.arguments import check_arguments
from turret.errors import AdapterError
from turret.methods import Method, by_name
from turret.ops.table import ops_for
from turret.transformer import Model

# --- checkpointed -----------------------------------------------------------------------------------------------------
# Layers that save only their inputs for the backward pass, which computes them again: `train.checkpoint_layers`.
#
# A step then keeps the input (N, D) of every layer. Only one layer at a time keeps the rest. It costs a second forward
# pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). torch's own checkpoint does it; here the
# batch is put back as it was, because the hooks read it, and the dropout masks are those of the first time. So the
# gradients are the same, bit for bit.


Forward = Callable[..., Any]  # a layer's: its arguments and results depend on the architecture


class CheckpointedForward:
    """Replaces the forward of a layer."""

    def __init__(self, forward: Forward, context: BatchContext) -> None:
        self._forward, self._context = forward, context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # as the layer's own
        if not torch.is_grad_enabled() or self._context.serves:
            return self._forward(*args, **kwargs)
        twice = _Twice(self._forward, self._context)
        return checkpoint(twice, *args, use_reentrant=False, preserve_rng_state=self._context.draws is None, **kwargs)


class _Twice:
    """A layer's forward in one pass. The second call sees the batch as it was before the first."""

    def __init__(self, forward: Forward, context: BatchContext) -> None:
        self._forward, self._context = forward, context
        self._batch: BatchContext | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._batch is None:
            self._context.memo.pop(NORMED, None)  # a tensor of the layer before, which is not to be kept
            self._batch = _copy_batch(self._context)
            return self._forward(*args, **kwargs)
        with _as_it_was(self._context, self._batch), drawing_alone(self._context):
            return self._forward(*args, **kwargs)


def _copy_batch(context: BatchContext) -> BatchContext:
    """The batch, with the layouts and masks that there are so far."""
    batch = copy.copy(context)
    batch.memo = dict(context.memo)
    batch.masks = copy.copy(context.masks)
    return batch


@contextmanager
def _as_it_was(context: BatchContext, batch: BatchContext) -> Iterator[None]:
    before = dict(vars(context))
    vars(context).update(vars(_copy_batch(batch)))
    try:
        yield
    finally:
        vars(context).update(before)


def checkpoint_layers(model: Model) -> None:
    """Let the layers of an attached model save only their inputs, until `detach`.

    Raises:
        AdapterError: the model has no list of layers.
    """
    attached = attachment(model)
    paths = layer_paths(model)
    if not paths:
        raise AdapterError(f"{attached.family.name} has no list of layers: leave train.checkpoint_layers off")
    ops_for(torch.empty(0))  # loads the kernels and checks them now: inside a layer, the check would save tensors too
    for path in paths:
        attached.undo.append(_replace(model.get_submodule(path), attached.context))


def _replace(layer: nn.Module, context: BatchContext) -> Callable[[], None]:
    """Replace the forward of one layer; returns a function that puts the earlier one back."""
    before = vars(layer).get("forward")
    own: nn.Module = layer  # whose forward may be replaced
    own.forward = CheckpointedForward(layer.forward, context)
    if before is None:
        return functools.partial(vars(layer).__delitem__, "forward")
    return functools.partial(setattr, layer, "forward", before)


# --- merge ------------------------------------------------------------------------------------------------------------
# An adapter merged into the weights of its base, as new tensors; the base keeps its own.


def require_mergeable(adapter: Adapter) -> None:
    """Raise AdapterError for a method that is more than a change of weights."""
    tuner_of(adapter.method).require_mergeable()


@torch.no_grad()
def merged_state(model: Model, adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of `model`, which has nothing attached, with the adapter merged into its weights.

    Weights that do not change are the model's own tensors; the others are new.

    Raises:
        AdapterError: the method cannot be merged, a layer is missing, or another layer shares its weight.
    """
    require_mergeable(adapter)
    if quantized.any_packed(model):
        raise AdapterError(
            "this base has quantized weights, so nothing can be merged into it: give the original model as base"
        )
    state: dict[str, Tensor] = dict(model.state_dict())
    new = {**adapter.head, **tuner_of(adapter.method).merged_weights(model, adapter)}
    shared = shared_names(model)
    for name, value in new.items():
        if name not in state or state[name].shape != value.shape:
            raise AdapterError(
                f"weight {name!r} of shape {tuple(value.shape)} does not fit this base: load its own base"
            )
        for each in shared.get(name, (name,)):
            state[each] = value.to(state[each].dtype).contiguous()
    return state


# --- lifecycle --------------------------------------------------------------------------------------------------------


M = TypeVar("M", bound=nn.Module)  # a model of transformers, by whatever class its user knows it


@check_arguments
def attach(
    model: M,
    method: Method | str,
    *,
    init_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    head: tuple[str, ...] = (),
) -> M:
    """Start a new adapter on `model`. Only the adapter and its head require gradients afterwards.

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
    attached.methods[ATTACHED] = method = method.on(attached.family.kind)
    try:
        tuner_of(method).start(base, attached, AdapterInit(init_ids, generator, head))
    except BaseException:
        detach(model)
        raise
    attached.context.active = ATTACHED
    return model


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
    method, given = attached.methods[ATTACHED], adapter.method
    if given.kind != method.kind:
        raise AdapterError(
            f"the adapter is a {given.kind} and the recipe trains {method.kind}: set method.kind to {given.kind}"
        )
    tuner_of(method).fill(model, attached, adapter, generator)


def extract(model: nn.Module, slot: int = ATTACHED) -> Extracted:
    """Copies of the tensors in a slot, on the CPU in float32. Raises AdapterError for an empty slot."""
    attached = attachment(model)
    if slot not in attached.methods:
        raise AdapterError(f"slot {slot} is empty: expected one of {sorted(attached.methods)}")
    return tuner_of(attached.methods[slot]).extract(attached, slot)


def mount(model: M, adapter: Adapter, slot: int = ATTACHED, *, fingerprint: str | None = None) -> M:
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
        tuner_of(adapter.method).mount(base, attached, adapter, slot)
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
