"""Classification heads: one set of modules for all adapters, called with the tensors of each adapter, in float32."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification

from turret.adapters import Adapter
from turret.adapters.adapter import check_head, head_paths
from turret.errors import AdapterError
from turret.families import Family
from turret.transformer import Model

HeadRows = tuple[Mapping[str, Tensor], int]  # the tensors of an adapter's head, and the number of its rows
# Calls a module of the body on rows of some adapters: (module, rows (B, ...), numbers of their heads)
Shared = Callable[[Callable[[Tensor], Tensor], Tensor, Sequence[int]], Tensor]


class Heads:
    """The head's modules by path, without weights, on the meta device.

    They are copies of the model's own. A model without a head gets those of the classifier of its configuration, so a
    base that was loaded to generate classifies too.
    """

    def __init__(self, model: Model, family: Family) -> None:
        self._family, self._body = family, model.base_model
        owner = model
        if not all(hasattr(model, name) for name in family.head_modules):
            with torch.device("meta"):
                owner = AutoModelForSequenceClassification.from_config(model.config)
        paths = [name for name in family.head_modules if hasattr(owner, name)]
        inside = [name for name in family.body_excludes if getattr(owner.base_model, name, None) is not None]
        self._inside = {name: f"{owner.base_model_prefix}.{name}" for name in inside}
        paths += self._inside.values()
        self._modules = {path: copy.deepcopy(owner.get_submodule(path)).to("meta").eval() for path in paths}

    def checked(self, adapter: Adapter, generates: bool) -> dict[str, Tensor]:
        """The adapter's head by names in the model. Raises AdapterError if it is incomplete or does not fit."""
        if generates:
            if adapter.head:
                raise AdapterError(f"an adapter that generates has no head, given {next(iter(adapter.head))}")
            return {}
        paths = head_paths(self._family, adapter.head)
        for path in paths:
            if path not in self._modules:
                raise AdapterError(f"the base has no {path!r}: the adapter belongs to another architecture")
            check_head(self._modules[path], path, _below(path, adapter.head))
        if missing := [name for name in self._family.head_modules if name in self._modules and name not in paths]:
            raise AdapterError(f"the adapter has no head {', '.join(missing)}: a classifier needs one; retrain")
        return dict(adapter.head)

    def logits(self, heads: Sequence[HeadRows], pooled: Tensor, shared: Shared) -> list[Tensor]:
        """The outputs of the heads.

        Args:
            heads: The head and the number of rows of each adapter, in the order of the rows.
            pooled: (B, D)
            shared: Calls a module of the body for adapters that store no weights of their own for it.

        Returns:
            (C,) float32 on the CPU for each row; C may differ.
        """

        def call(path: str, module: nn.Module | None, x: Tensor) -> Tensor | list[Tensor]:
            """A module of the head on rows (B, ...). Adapters without weights for it use the body's module."""
            inputs = torch.split(x, [count for _, count in heads])
            weights = [_below(path, head) for head, _ in heads]
            without = [number for number, own in enumerate(weights) if not own]
            outputs: dict[int, Tensor] = {}
            if without:
                assert module is not None
                joint = torch.cat([inputs[number] for number in without]) if len(without) < len(heads) else x
                rows = shared(module, joint.to(next(module.parameters()).dtype), without).float()
                outputs = dict(zip(without, torch.split(rows, [heads[number][1] for number in without]), strict=True))
            for number, own in enumerate(weights):
                if own:
                    wide = {name: value.float() for name, value in own.items()}
                    outputs[number] = functional_call(self._modules[path], wide, (inputs[number].float(),))
            return _joined([outputs[number] for number in range(len(heads))])

        parts = {name: functools.partial(call, name, None) for name in self._family.head_modules}
        modules = {name: getattr(self._body, name, None) for name in self._inside}  # now: LoRA may have replaced one
        body = {name: functools.partial(call, path, modules[name]) for name, path in self._inside.items()}
        dropouts = dict.fromkeys(self._family.head_dropouts, _same)
        # Not a real model: its parts take and give a list of rows where heads differ in classes.
        model: Any = SimpleNamespace(**parts, **dropouts, base_model=SimpleNamespace(**body))
        logits: Any = self._family.classify(model, pooled)
        return [row for rows in (logits if isinstance(logits, list) else [logits]) for row in rows.cpu()]


def _below(path: str, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one module, by names inside it."""
    return {name[len(path) + 1 :]: value for name, value in head.items() if name.startswith(path + ".")}


def _joined(rows: list[Tensor]) -> Tensor | list[Tensor]:
    """One tensor, or a list if the heads differ in the number of classes."""
    return torch.cat(rows) if len({each.shape[1:] for each in rows}) == 1 else rows


def _same(x: Tensor) -> Tensor:
    return x
