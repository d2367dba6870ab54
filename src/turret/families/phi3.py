"""Phi 3 (Abdin et al. 2024), and later Phis of the same classes. One layer computes queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from turret.families.family import FastPaths
from turret.families.llama import llama_like
from turret.families.mistral import configured_window

PHI3 = replace(
    llama_like("phi3", "Phi3"),
    lora_targets=("qkv_proj",),
    window=configured_window,
    fast=FastPaths(rms_norms=("Phi3RMSNorm",)),
    gguf="phi3",
)
