"""A module of the body that an adapter replaces whole: a norm, an embedding, or the output layer.

PEFT trains such modules with `modules_to_save`, `bias = "all"`, `trainable_token_indices` and LN tuning. Each row of a
batch uses the module of its own adapter. All these modules work token by token, so rows do not mix.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from turret.adapters.batch_context import BatchContext
from turret.ops.lora import linear


class RoutedWhole(nn.Module):
    """The base's own module for slot 0 and for adapters that do not replace it, and a frozen copy for each that does.

    x: (B, T, ...) padded or (1, N, ...) unpadded, ids (int64) or hidden states; the output layer also takes (N, D).
    """

    def __init__(self, base_module: nn.Module, context: BatchContext, path: str, stream: str) -> None:
        super().__init__()
        self.base_module = base_module
        self.slots = nn.ModuleDict()
        self.context = context
        self.path, self.stream = path, stream

    @property
    def weight(self) -> Tensor:
        """The base's own weight; models read its dtype."""
        return self.base_module.get_parameter("weight")

    def at(self, slot: int) -> nn.Module:
        """The module that the rows of a slot take."""
        return self.slots[str(slot)] if str(slot) in self.slots else self.base_module  # noqa: SIM401 (a ModuleDict)

    def forward(self, x: Tensor) -> Tensor:
        if self.context.adapter_pool is not None:
            return self.context.adapter_pool.whole(self, x)
        slot = self.context.single()
        if slot is not None:
            return linear(self.at(slot), x)
        dim, groups = self.context.places_by_slot(self.stream, x.device)
        if dim == 0 and len(x) == 1:  # positions, the same for all rows
            x = x.expand(sum(map(len, groups.values())), *x.shape[1:])
        y = linear(self.base_module, x)
        for slot, index in groups.items():
            if str(slot) in self.slots:
                y = y.index_copy(dim, index, self.slots[str(slot)](x.index_select(dim, index)).to(y.dtype))
        return y


def current(module: nn.Module) -> nn.Module:
    """The one module that all rows of this pass take, or `module` itself if they take several."""
    if not isinstance(module, RoutedWhole):
        return module
    if (pool := module.context.adapter_pool) is not None:
        return module if pool.scales else module.base_module
    slot = module.context.single()
    return module if slot is None else module.at(slot)


def unrouted(module: nn.Module) -> nn.Module:
    """The base's own module."""
    return module.base_module if isinstance(module, RoutedWhole) else module


def twin(module: nn.Module) -> nn.Module:
    """New modules with the same parameters; a deep copy would take longer than reading an adapter."""
    made = copy.copy(module)
    vars(made)["_parameters"] = dict(module._parameters)
    vars(made)["_modules"] = {name: child if child is None else twin(child) for name, child in module._modules.items()}
    return made.eval()


def with_values(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A frozen copy of a module with its own parameters, those in `values` replaced, all in the module's dtypes."""
    made = twin(module)
    for name, own in module.named_parameters():
        parent, _, key = name.rpartition(".")
        value = values.get(name, own).detach().to(own.device, own.dtype, copy=True)
        setattr(made.get_submodule(parent), key, nn.Parameter(value, requires_grad=False))
    return made


class TokenRows(nn.Module):
    """An embedding with other vectors for a few tokens. ids: (n,) int64, all different; vectors: (n, D)."""

    ids: Tensor

    def __init__(self, embedding: nn.Module, ids: Sequence[int], vectors: Tensor) -> None:
        super().__init__()
        own = embedding.get_parameter("weight")
        order = sorted(range(len(ids)), key=lambda place: ids[place])
        self.register_buffer("ids", torch.tensor([ids[place] for place in order], device=own.device))
        self.few = twin(embedding)  # scales its vectors as the embedding does
        vars(self.few)["padding_idx"] = None
        self.few.weight = nn.Parameter(vectors[order].detach().to(own.device, own.dtype), requires_grad=False)
        self._all = (embedding,)  # the base's own, not a child of this module

    def forward(self, x: Tensor) -> Tensor:
        place = torch.searchsorted(self.ids, x).clamp_(max=len(self.ids) - 1)
        found = (self.ids[place] == x)[..., None]
        y: Tensor = torch.where(found, self.few(place), self._all[0](x))
        return y


class TokenLogits(nn.Module):
    """An output layer whose weights for a few tokens are those of a `TokenRows`, because the base ties both."""

    def __init__(self, layer: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.rows = rows
        self._all = (layer,)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rows.few.get_parameter("weight")
        return linear(self._all[0], x).index_copy(-1, self.rows.ids, x @ weight.mT)


def merged_values(module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    """The parameters of the base's module after a merge, by name. weight: the base's own."""
    rows = module.rows if isinstance(module, TokenLogits) else module
    if isinstance(rows, TokenRows):
        few = rows.few.get_parameter("weight")
        return {"weight": weight.index_copy(0, rows.ids.to(weight.device), few.to(weight.device, weight.dtype))}
    return dict(module.named_parameters())
