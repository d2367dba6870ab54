"""Random adapters for the small models, and each one alone: the reference for the engine.

made("bert", "classify", LoRA(...), seed=1, labels=3)     an Adapter whose every tensor matters
alone(family, task, adapter)                              a fresh model with it mounted, nothing else
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tiny_training
import torch
from small_models import build

from turret.adapters import Adapter, BaseInfo, attach, attachment, extract, mount
from turret.engine.runner import Runner
from turret.methods import Head, LoRA, Method, Prefix

CLASSIFIES = SimpleNamespace(labels=("a", "b"), num_labels=len, reads_tokens=False)  # what a runner reads of a task
GENERATES = SimpleNamespace(labels=(), num_labels=lambda _: None, reads_tokens=False)
LENGTHS = (9, 3, 14, 1, 20, 6, 6, 11)  # of the rows of a batch
METHODS: dict[str, Method] = {
    "lora": LoRA(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False),
    "wide": LoRA(r=12, lora_alpha=6, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear"),
    "prefix": Prefix(num_virtual_tokens=5, reparametrize=False),
    "head": Head(),
}


def made(
    family: str,
    task: Any,
    method: Method,
    seed: int = 1,
    labels: int = 3,
    spec: dict[str, Any] | None = None,
    **changes: Any,
) -> Adapter:
    """An adapter with random tensors, large enough that a missing one shows. changes: of the base's configuration."""
    model = build(family, task, **({"num_labels": labels} if task == "classify" else {}), **changes)
    generator = torch.Generator().manual_seed(seed)
    attach(model, method, generator=generator)
    with torch.no_grad():
        for each in attachment(model).parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape, generator=generator) * 0.05)
        for head in attachment(model).heads.values():
            for each in head.slots.parameters():
                each.copy_(torch.randn(each.shape, generator=generator) * 0.3)
        guest = attachment(model).guest
        for each in guest.parameters.values() if guest is not None and guest.layers else ():
            each.add_(torch.randn(each.shape, generator=generator) * 0.2)
        for prefix in attachment(model).prefixes.parameters():
            prefix.add_(torch.randn(prefix.shape, generator=generator) * 0.3)
        for linear in attachment(model).linears.values():
            for each in linear.slots.parameters():
                each.copy_(torch.randn(each.shape, generator=generator) * 0.2)
    tensors, head_tensors, kept = extract(model)
    return Adapter(kept, tensors, head_tensors, BaseInfo("small", "sha256:small"), task=spec or {})


def alone(family: str, task: Any, adapter: Adapter | None, labels: int = 3) -> Any:
    model = build(family, task, **({"num_labels": labels} if task == "classify" else {}))
    return model if adapter is None else mount(model, adapter)


def runner_of(
    family: str, task: Any, adapters: list[Adapter], dtype: torch.dtype = torch.float32, **changes: Any
) -> Runner:
    """A runner with these in slots 1, 2, ... changes: of the base's configuration."""
    base = tiny_training.base(family, task, **changes)
    base.model.to(dtype)
    runner = Runner(base)
    for slot, adapter in enumerate(adapters, 1):
        spec = CLASSIFIES if task == "classify" else GENERATES
        runner.adapter_pool.mount(slot, runner.adapter_pool.prepare(adapter, f"sha256:{slot}", spec))
    return runner
