"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from typing import Any

from turret.families.family import Family, last


def classify(model: Any, pooled: Any) -> Any:
    return model.score(pooled)


GPT2 = Family(
    name="gpt2",
    kind="decoder",
    attention=("GPT2Attention",),
    lora_targets=("c_attn",),
    head_modules=("score",),
    classify=classify,
    pooling=last,
    positions="table",
    fan_in_fan_out=True,
)
