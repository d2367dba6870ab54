"""ModernBERT (Warner et al. 2024)."""

from __future__ import annotations

from turret.families.family import Family

MODERNBERT = Family(
    name="modernbert",
    kind="encoder",
    attention=("ModernBertAttention",),
    lora_targets=("Wqkv",),
    head_modules=("head", "classifier"),
    classify=lambda part, pooled: part("classifier")(part("drop")(part("head")(pooled))),
    head_dropouts=("drop",),
    tag_modules=("head", "classifier"),
    tag=lambda part, hidden: part("classifier")(part("drop")(part("head")(hidden))),
    pooling=lambda config: "mean" if config.classifier_pooling == "mean" else "first",
)
