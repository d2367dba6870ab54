"""Mistral (Jiang et al. 2023)."""

from __future__ import annotations

from dataclasses import replace

from turret.families.llama import llama_like

MISTRAL = replace(
    llama_like("mistral", "Mistral"), window=lambda module: getattr(module.config, "sliding_window", None)
)
