"""ModernBERT (Warner et al. 2024)."""

from __future__ import annotations

from typing import Any

from turret.families.family import Family, Pooling


def classify(model: Any, pooled: Any) -> Any:
    return model.classifier(model.drop(model.head(pooled)))


def configured(config: Any) -> Pooling:
    return "mean" if config.classifier_pooling == "mean" else "first"


MODERNBERT = Family(
    name="modernbert",
    kind="encoder",
    attention=("ModernBertAttention",),
    lora_targets=("Wqkv",),
    head_modules=("head", "classifier"),
    classify=classify,
    head_dropouts=("drop",),
    pooling=configured,
)
