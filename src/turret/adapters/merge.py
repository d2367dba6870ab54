"""An adapter merged into the weights of its base, as new tensors; the base keeps its own."""

from __future__ import annotations

import torch
from torch import Tensor

from turret import quantized
from turret.adapters.adapter import Adapter, shared_names
from turret.errors import AdapterError
from turret.methods.lookup import numbers_of
from turret.transformer import Model


def require_mergeable(adapter: Adapter) -> None:
    """Raise AdapterError for a method that is more than a change of weights."""
    numbers_of(adapter.method).require_mergeable()


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
    new = {**adapter.head, **numbers_of(adapter.method).merged(model, adapter)}
    shared = shared_names(model)
    for name, value in new.items():
        if name not in state or state[name].shape != value.shape:
            raise AdapterError(
                f"weight {name!r} of shape {tuple(value.shape)} does not fit this base: load its own base"
            )
        for each in shared.get(name, (name,)):
            state[each] = value.to(state[each].dtype).contiguous()
    return state
