"""DistilBERT (Sanh et al. 2019)."""

from __future__ import annotations

from typing import Any

from turret.families.family import Family


def classify(model: Any, pooled: Any) -> Any:
    return model.classifier(model.dropout(model.pre_classifier(pooled).relu()))


DISTILBERT = Family(
    name="distilbert",
    kind="encoder",
    attention=("DistilBertSelfAttention",),
    lora_targets=("q_lin", "v_lin"),
    head_modules=("pre_classifier", "classifier"),
    classify=classify,
    head_dropouts=("dropout",),
    positions="table",
)
