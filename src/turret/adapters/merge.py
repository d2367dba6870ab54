"""An adapter folded into the weights of its base, as new tensors: the base keeps its own.

Knows numbers and names of parameters. Refuses to know files, and a prefix: it lives in front of the keys and values of
every layer, and no weight can say that.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters import through_peft
from turret.adapters.adapter import LORA_PREFIX, Adapter
from turret.errors import AdapterError
from turret.families import family_of
from turret.methods import LoRA, Peft, Prefix


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scaling: float, *, transposed: bool = False) -> Tensor:
    """`W' = W + scaling * B A`, summed in float32 and rounded once to W's dtype; a new tensor.

    W: (D_out, D_in), or (D_in, D_out) where `transposed` (GPT-2's Conv1D). A: (R, D_in), B: (D_out, R).
    """
    delta = scaling * (B.float() @ A.float())  # (D_out, D_in)
    return (W.float() + (delta.mT if transposed else delta)).to(W.dtype)


def require_mergeable(adapter: Adapter) -> None:
    """Raises AdapterError for a method that is more than weights."""
    if isinstance(adapter.method, Prefix):
        raise AdapterError(
            "a prefix cannot be merged: it is keys and values in front of every layer, not a change of weights; "
            "export it without --merged"
        )


@torch.no_grad()
def merged_state(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of `model`, with nothing attached, as it would be with the adapter in its weights.

    Weights that do not change are the model's own tensors; the others are new. Raises AdapterError for a prefix, a
    layer that is not there, and one whose weight another layer shares.
    """
    require_mergeable(adapter)
    state: dict[str, Tensor] = dict(model.state_dict())
    new = {**adapter.head}
    if isinstance(adapter.method, Peft):
        new |= _peft(model, adapter, adapter.method)
    elif isinstance(adapter.method, LoRA):
        new |= _lora(model, adapter, adapter.method)
    else:
        new |= adapter.tensors
    shared = _shared(model)
    for name, value in new.items():
        if name not in state or state[name].shape != value.shape:
            raise AdapterError(
                f"weight {name!r} of shape {tuple(value.shape)} does not fit this base: load its own base"
            )
        for each in shared.get(name, (name,)):
            state[each] = value.to(state[each].dtype).contiguous()
    return state


def _peft(model: Any, adapter: Adapter, method: Peft) -> dict[str, Tensor]:
    """The weights that PEFT's own merging changes, on a copy."""
    twin = copy.deepcopy(model)
    guest = through_peft.invite(twin, family_of(twin.config), method)
    through_peft.fill(guest, adapter.tensors)
    before = model.state_dict()
    whole = through_peft.merged(guest)
    if odd := sorted(set(whole) ^ set(before)):
        raise AdapterError(f"PEFT does not merge {method.peft_type} whole ({odd[0]}): export it without --merged")
    return {name: each for name, each in whole.items() if not torch.equal(each, before[name])}


def _lora(model: Any, adapter: Adapter, method: LoRA) -> dict[str, Tensor]:
    shared, merged = _shared(model), {}
    suffix = ".lora_A.weight"
    for name, A in adapter.tensors.items():
        if not name.endswith(suffix):
            continue
        path = name.removeprefix(LORA_PREFIX).removesuffix(suffix)
        weight = f"{path}.weight"
        if len(shared.get(weight, ())) > 1:
            raise AdapterError(f"{path} shares its weight with another layer: it cannot be merged into one alone")
        layer = model.get_submodule(path)
        B = adapter.tensors[f"{name.removesuffix(suffix)}.lora_B.weight"]
        merged[weight] = merged_weight(layer.weight, A, B, method.scaling, transposed=not isinstance(layer, nn.Linear))
    return merged


def _shared(model: Any) -> dict[str, tuple[str, ...]]:
    """Name of a parameter -> all its names."""
    names: dict[int, list[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(each), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}
