"""Mistral (Jiang et al. 2023)."""

from __future__ import annotations

from typing import Any

from turret.families.llama import llama_like


def window(module: Any) -> int | None:
    configured: int | None = getattr(module.config, "sliding_window", None)
    return configured


MISTRAL = llama_like("mistral", "Mistral", window=window)
