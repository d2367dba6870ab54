"""Qwen 2 (Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from turret.families.llama import llama_like

QWEN2 = replace(llama_like("qwen2", "Qwen2"), gguf="qwen2")
