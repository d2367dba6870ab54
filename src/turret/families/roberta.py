"""RoBERTa (Liu et al. 2019)."""

from __future__ import annotations

from typing import Any

from turret.families.bert import bert_layers
from turret.families.family import Family


def classify(model: Any, pooled: Any) -> Any:
    return model.classifier(pooled[:, None])  # RobertaClassificationHead takes the first of (B, 1, D)


def after_padding(config: Any) -> int:
    return int(config.pad_token_id) + 1  # positions are counted from the padding index on


ROBERTA = Family(
    name="roberta",
    kind="encoder",
    attention=("RobertaSelfAttention",),
    lora_targets=("query", "value"),
    head_modules=("classifier",),
    classify=classify,
    body_excludes=("pooler",),
    positions="table",
    position_offset=after_padding,
    fast=bert_layers("Roberta"),
)
