"""Qwen 2 (Yang et al. 2024)."""

from __future__ import annotations

from turret.families.llama import llama_like

QWEN2 = llama_like("qwen2", "Qwen2")
