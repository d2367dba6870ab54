"""DistilBERT (Sanh et al. 2019)."""

from __future__ import annotations

from turret.families.family import Family

DISTILBERT = Family(
    name="distilbert",
    kind="encoder",
    attention=("DistilBertSelfAttention",),
    lora_targets=("q_lin", "v_lin"),
    head_modules=("pre_classifier", "classifier"),
    classify=lambda part, pooled: part("classifier")(part("dropout")(part("pre_classifier")(pooled).relu())),
    head_dropouts=("dropout",),
    positions="table",
)
