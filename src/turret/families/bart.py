"""BART (Lewis et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from turret.families.family import Family, last


def classify(model: Any, pooled: Any) -> Any:
    return model.classification_head(pooled)


def vocabulary(model: Any, hidden: Any, output: Callable[[Any], Any]) -> Any:
    return output(hidden) + model.final_logits_bias


BART = Family(
    name="bart",
    kind="encoder-decoder",
    attention=("BartAttention",),
    lora_targets=("q_proj", "v_proj"),
    head_modules=("classification_head",),
    classify=classify,
    pooling=last,
    positions="table",
    position_module="embed_positions",
    cross_attention=("encoder_attn",),
    source_projections=("k_proj", "v_proj"),
    vocabulary=vocabulary,
)
