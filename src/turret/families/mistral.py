"""Mistral (Jiang et al. 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from turret.families.llama import llama_like

if TYPE_CHECKING:
    from torch import nn


def configured_window(module: nn.Module) -> int | None:
    """The sliding window of all layers, as the configuration has it."""
    return getattr(getattr(module, "config", None), "sliding_window", None)


MISTRAL = replace(
    llama_like("mistral", "Mistral"),
    window=configured_window,
    gguf="llama",  # llama.cpp has no architecture of its own for it
    gguf_rotary=("q_proj", "k_proj"),
)
