"""An adapter folded into the weights of its base, as new tensors: the base keeps its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turret.adapters.adapter import Adapter, shared_names
from turret.errors import AdapterError
from turret.methods.lookup import numbers_of


def require_mergeable(adapter: Adapter) -> None:
    """Raises AdapterError for a method that is more than weights."""
    numbers_of(adapter.method).require_mergeable()


@torch.no_grad()
def merged_state(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of `model`, with nothing attached, as it would be with the adapter in its weights.

    Weights that do not change are the model's own tensors; the others are new. Raises AdapterError for a prefix, a
    layer that is not there, and one whose weight another layer shares.
    """
    require_mergeable(adapter)
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
