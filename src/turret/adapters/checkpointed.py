"""Layers that save only their inputs for the backward pass, which computes them again: `train.checkpoint_layers`.

A step then keeps one input (N, D) of every layer and what one layer saves, instead of what all layers save. It costs a
second forward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). torch's own checkpoint does it;
here the batch is put back as it was, because the hooks read it, and the dropout masks are those of the first time. So
the gradients are the same, bit for bit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turret.adapters.attached import ATTRIBUTE, attachment
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused.norms import COMPUTED_FROM
from turret.errors import AdapterError
from turret.kernels import usable
from turret.transformer import Model

Forward = Callable[..., Any]  # a layer's: its arguments and results depend on the architecture


class CheckpointedForward:
    """Replaces the forward of a layer."""

    def __init__(self, forward: Forward, context: BatchContext) -> None:
        self._forward, self._context = forward, context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # as the layer's own
        if not torch.is_grad_enabled() or self._context.serves:
            return self._forward(*args, **kwargs)
        output = checkpoint(_Twice(self._forward, self._context), *args, use_reentrant=False, **kwargs)
        _forget_inputs(output)
        return output


class _Twice:
    """A layer's forward in one pass. The second call sees the batch as it was before the first."""

    def __init__(self, forward: Forward, context: BatchContext) -> None:
        self._forward, self._context = forward, context
        self._batch: BatchContext | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._batch is None:
            self._batch = _copied(self._context)
            return self._forward(*args, **kwargs)
        with _as_it_was(self._context, self._batch):
            return self._forward(*args, **kwargs)


def _copied(context: BatchContext) -> BatchContext:
    """The batch, with the layouts and masks that there are so far."""
    batch = copy.copy(context)
    batch.memo = dict(context.memo)
    batch.masks = None if context.masks is None else context.masks.copy()
    return batch


@contextmanager
def _as_it_was(context: BatchContext, batch: BatchContext) -> Iterator[None]:
    before = dict(vars(context))
    vars(context).update(vars(_copied(batch)))
    try:
        yield
    finally:
        vars(context).update(before)


def _forget_inputs(output: object) -> None:
    """Drop what a norm attached to a layer's output: it would keep one more tensor of every layer alive.

    output: a tensor, or a tuple with tensors.
    """
    for each in output if isinstance(output, tuple) else (output,):
        if isinstance(each, Tensor):
            vars(each).pop(COMPUTED_FROM, None)


def checkpoint_layers(model: Model) -> None:
    """Let the layers of an attached model save only their inputs, until `detach`.

    Raises:
        AdapterError: the model has no list of layers.
    """
    attached = attachment(model)
    layers = _layers(model)
    if not layers:
        raise AdapterError(f"{attached.family.name} has no list of layers: leave train.checkpoint_layers off")
    usable(torch.empty(0))  # loads the kernels and checks them now: inside a layer, the check would save tensors too
    for layer in layers:
        attached.undo.append(_replace(layer, attached.context))


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers of every stack: what lists of modules hold that are not inside another list."""
    lists: list[str] = []
    layers: list[nn.Module] = []
    for path, module in model.named_modules():
        inside = path.startswith((f"{ATTRIBUTE}.", *(f"{each}." for each in lists)))
        if isinstance(module, nn.ModuleList) and not inside:
            lists.append(path)
            layers += module
    return layers


def _replace(layer: nn.Module, context: BatchContext) -> Callable[[], None]:
    """Replace the forward of one layer; returns a function that puts the earlier one back."""
    before = vars(layer).get("forward")
    own: nn.Module = layer  # whose forward may be replaced
    own.forward = CheckpointedForward(layer.forward, context)
    if before is None:
        return functools.partial(vars(layer).__delitem__, "forward")
    return functools.partial(setattr, layer, "forward", before)
