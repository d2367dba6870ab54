"""BART (Lewis et al. 2020)."""

from __future__ import annotations

from turret.families.family import Family, last

BART = Family(
    name="bart",
    kind="encoder-decoder",
    attention=("BartAttention",),
    lora_targets=("q_proj", "v_proj"),
    head_modules=("classification_head",),
    classify=lambda model, pooled: model.classification_head(pooled),
    pooling=last,
    positions="table",
    position_module="embed_positions",
    cross_attention=("encoder_attn",),
    source_projections=("k_proj", "v_proj"),
    vocabulary=lambda model, hidden, output: output(hidden) + model.final_logits_bias,
)
