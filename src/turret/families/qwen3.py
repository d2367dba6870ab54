"""Qwen 3 (Yang et al. 2025)."""

from __future__ import annotations

from dataclasses import replace

from turret.families.llama import llama_like

QWEN3 = replace(llama_like("qwen3", "Qwen3"), gguf="qwen3")
