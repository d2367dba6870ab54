"""Modules that replace the base's own and read the context: a task's head, and dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters.batch_context import BatchContext
from turret.adapters.fused.dropout import dropout
from turret.errors import AdapterError


class RoutedModule(nn.Module):
    """A task's head: the base's own module for slot 0, a copy for every other slot. x: (B, ...) -> (B, ...)."""

    def __init__(self, base_module: nn.Module, context: BatchContext) -> None:
        super().__init__()
        self.base_module = base_module
        self.slots = nn.ModuleDict()
        self.context = context

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # what the base passes to its own head
        def run(slot: int, rows: Tensor) -> Tensor:
            key = str(slot)
            module = self.slots[key] if key in self.slots else self.base_module  # noqa: SIM401 (a ModuleDict has no get)
            weight = next(module.parameters(), rows)
            output: Tensor = module(rows.to(weight.dtype), *args, **kwargs)
            return output

        slot = self.context.single()
        if slot is not None or self.context.in_body:  # inside a body, a pooler's output on unpadded tokens is not used
            return run(self.context.active if slot is None else slot, x)
        parts = {
            slot: ((index := torch.tensor(rows, device=x.device)), run(slot, x[index]))
            for slot, rows in self.context.rows_by_slot().items()
        }
        widths = {part.shape[-1] for _, part in parts.values()}
        if len(widths) > 1:
            raise AdapterError(f"heads of different sizes {sorted(widths)} in one batch: give each size its own batch")
        first = next(iter(parts.values()))[1]
        output = first.new_empty(x.shape[0], *first.shape[1:])
        for index, part in parts.values():
            output = output.index_copy(0, index, part.to(first.dtype))
        return output


class RoutedDropout(nn.Dropout):
    """Replaces a dropout layer of the base: the same, with the masks of the pass."""

    def __init__(self, replaced: nn.Dropout, context: BatchContext) -> None:
        super().__init__(replaced.p)
        self.replaced = replaced  # follows train() and eval() with this one
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.context.masks) if self.training else x
