"""Adapters on a frozen transformer: LoRA and prefix, attached and detached without writing to the base.

There are two hooks: the routed linear layer (`lora`) and the attention function (`attention`). `lifecycle` has the
verbs, `packed` runs unpadded rows, `layers` lets whole layers compute as one block.
"""

from turret.adapters.adapter import Adapter, BaseInfo, StoredAdapter, require_base
from turret.adapters.batch_context import ATTACHED, BARE, REFERENCE, set_context
from turret.adapters.hooks import (
    attachment,
    detach,
    drawing,
    mixed_precision,
    on_slot,
    target_paths,
    trainable_parameters,
)
from turret.adapters.lifecycle import attach, checkpoint_layers, extract, mount, start_from, unmount
from turret.adapters.packed import classify_logits, target_logits

__all__ = [
    "ATTACHED",
    "BARE",
    "REFERENCE",
    "Adapter",
    "BaseInfo",
    "StoredAdapter",
    "attach",
    "attachment",
    "checkpoint_layers",
    "classify_logits",
    "detach",
    "drawing",
    "extract",
    "mixed_precision",
    "mount",
    "on_slot",
    "require_base",
    "set_context",
    "start_from",
    "target_logits",
    "target_paths",
    "trainable_parameters",
    "unmount",
]
