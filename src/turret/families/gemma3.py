"""Gemma 3 (Gemma Team 2025): the models that read text alone."""

from __future__ import annotations

from dataclasses import replace

from turret.families.gemma2 import gemma_like

GEMMA3 = replace(gemma_like("gemma3_text", "Gemma3"), gguf="gemma3", heads_first=("q_norm", "k_norm"))
