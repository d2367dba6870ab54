"""The modules that make classes of a pooled token: one set for all adapters, given the numbers of whoever answers.

Knows the head's modules and an adapter's own numbers for them. Refuses to know slots, and where the numbers are kept.
They are computed with in float32, whatever precision they are kept in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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


class Heads:
    """The shapes of the head's modules by path: the model's own, or those of the classifier of its configuration."""

    def __init__(self, model: Any, family: Family) -> None:
        self._family, self._body = family, model.base_model
        owner = model
        if not all(hasattr(model, name) for name in family.head_modules):
            with torch.device("meta"):
                owner = AutoModelForSequenceClassification.from_config(model.config)
        paths = [name for name in family.head_modules if hasattr(owner, name)]
        prefix = f"{owner.base_model_prefix}."
        paths += [prefix + name for name in family.body_excludes if getattr(owner.base_model, name, None) is not None]
        self._modules = {path: copy.deepcopy(owner.get_submodule(path)).to("meta").eval() for path in paths}

    def checked(self, adapter: Adapter, kind: str) -> dict[str, Tensor]:
        """The adapter's head as it is stored, by names in the model: it is whole and fits, or AdapterError says how."""
        if kind != "classify":
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

    def logits(self, head: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
        """Pooled vectors (B, D) -> (B, C), with the adapter's own modules in place of the base's."""
        own = {path: self._filled(path, values) for path in self._modules if (values := _below(path, head))}
        parts = {name: own[name] for name in self._family.head_modules if name in own}
        body = {
            name: next((own[path] for path in own if path.endswith("." + name)), _cast(getattr(self._body, name, None)))
            for name in self._family.body_excludes
        }
        stand_in = SimpleNamespace(**parts, base_model=SimpleNamespace(**body), dropout=_same, drop=_same)
        logits: Tensor = self._family.classify(stand_in, pooled)
        return logits

    def _filled(self, path: str, values: Mapping[str, Tensor]) -> Callable[..., Any]:
        module, wide = self._modules[path], {name: value.float() for name, value in values.items()}
        return lambda x, *rest: functional_call(module, wide, (x.float(), *rest))


def _below(path: str, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to one module, by names inside it."""
    return {name[len(path) + 1 :]: value for name, value in head.items() if name.startswith(path + ".")}


def _cast(module: nn.Module | None) -> Callable[..., Any] | None:
    """A module of the base, on inputs of whatever precision."""
    if module is None:
        return None
    dtype = next(module.parameters()).dtype
    return lambda x, *rest: module(x.to(dtype), *rest)


def _same(x: Tensor) -> Tensor:
    return x
