"""The modules that make classes of a pooled token: one set for all adapters, given the numbers of whoever answers.

Knows the head's modules and an adapter's own numbers for them. Refuses to know slots, and where the numbers are kept.
They are computed with in float32, whatever precision they are kept in.
"""

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

Rows = tuple[Mapping[str, Tensor], int]  # an adapter's head, and how many rows it answers
Shared = Callable[
    [Callable[[Tensor], Tensor], Tensor, Sequence[int]], Tensor
]  # (a module of the body, rows, which of the heads)


class Heads:
    """The shapes of the head's modules by path: the model's own, or those of the classifier of its configuration."""

    def __init__(self, model: Any, family: Family) -> None:
        self._family, self._body = family, model.base_model
        owner = model
        if not all(hasattr(model, name) for name in family.head_modules):
            with torch.device("meta"):
                owner = AutoModelForSequenceClassification.from_config(model.config)
        paths = [name for name in family.head_modules if hasattr(owner, name)]
        inside = [name for name in family.body_excludes if getattr(owner.base_model, name, None) is not None]
        self._inside = {name: (f"{owner.base_model_prefix}.{name}", getattr(self._body, name, None)) for name in inside}
        paths += [path for path, _ in self._inside.values()]
        self._modules = {path: copy.deepcopy(owner.get_submodule(path)).to("meta").eval() for path in paths}

    def checked(self, adapter: Adapter, generates: bool) -> dict[str, Tensor]:
        """The adapter's head as it is stored, by names in the model: it is whole and fits, or AdapterError says how."""
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

    def logits(self, heads: Sequence[Rows], pooled: Tensor, shared: Shared) -> list[Tensor]:
        """Pooled vectors (B, D) -> (C,) float32 on the CPU each. heads: of all the rows, in their order."""

        def own(path: str, module: nn.Module | None, x: Tensor) -> Tensor | list[Tensor]:
            """A module of the head on rows (B, ...), or the body's own for those heads that bring none."""
            given = torch.split(x, [count for _, count in heads])
            values = [_below(path, head) for head, _ in heads]
            bare = [each for each, parts in enumerate(values) if not parts]
            made: dict[int, Tensor] = {}
            if bare:
                assert module is not None
                joint = torch.cat([given[each] for each in bare]) if len(bare) < len(heads) else x
                rows = shared(module, joint.to(next(module.parameters()).dtype), bare).float()
                made = dict(zip(bare, torch.split(rows, [heads[each][1] for each in bare]), strict=True))
            for each, parts in enumerate(values):
                if parts:
                    wide = {name: value.float() for name, value in parts.items()}
                    made[each] = functional_call(self._modules[path], wide, (given[each].float(),))
            return _joined([made[each] for each in range(len(heads))])

        parts = {name: functools.partial(own, name, None) for name in self._family.head_modules}
        body = {name: functools.partial(own, path, module) for name, (path, module) in self._inside.items()}
        dropouts = dict.fromkeys(self._family.head_dropouts, _same)
        # Not a real model: its parts take and give a list of rows where heads differ in classes.
        model: Any = SimpleNamespace(**parts, **dropouts, base_model=SimpleNamespace(**body))
        logits: Any = self._family.classify(model, pooled)
        return [row for rows in (logits if isinstance(logits, list) else [logits]) for row in rows.cpu()]


def _below(path: str, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to one module, by names inside it."""
    return {name[len(path) + 1 :]: value for name, value in head.items() if name.startswith(path + ".")}


def _joined(rows: list[Tensor]) -> Tensor | list[Tensor]:
    """As one, but for a last module's where heads differ in classes."""
    return torch.cat(rows) if len({each.shape[1:] for each in rows}) == 1 else rows


def _same(x: Tensor) -> Tensor:
    return x
