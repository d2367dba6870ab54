"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from turret.families.family import Family, last_token
from turret.families.llama import classify

GPT2 = Family(
    name="gpt2",
    kind="decoder",
    attention=("GPT2Attention",),
    lora_targets=("c_attn",),
    head_modules=("score",),
    classify=classify,
    tag_modules=(),
    pooling=last_token,
    positions="table",
    fan_in_fan_out=True,
)
