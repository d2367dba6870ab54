"""Phi 3 (Abdin et al. 2024), and later Phis of the same classes. One layer computes queries, keys and values."""

from __future__ import annotations

from turret.families.family import Family, FastPaths, last
from turret.families.mistral import configured_window

PHI3 = Family(
    name="phi3",
    kind="decoder",
    attention=("Phi3Attention",),
    lora_targets=("qkv_proj",),
    head_modules=("score",),
    classify=lambda model, pooled: model.score(pooled),
    pooling=last,
    window=configured_window,
    vllm_lora=True,
    fast=FastPaths(rms_norms=("Phi3RMSNorm",)),
)
