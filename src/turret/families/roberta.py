"""RoBERTa (Liu et al. 2019)."""

from __future__ import annotations

from turret.families.bert import bert_layers
from turret.families.family import Family

ROBERTA = Family(
    name="roberta",
    kind="encoder",
    attention=("RobertaSelfAttention",),
    lora_targets=("query", "value"),
    head_modules=("classifier",),
    classify=lambda model, pooled: model.classifier(pooled[:, None]),  # its head reads the first token of (B, T, D)
    body_excludes=("pooler",),
    positions="table",
    position_offset=lambda config: config.pad_token_id + 1,  # positions begin after the padding index
    fast=bert_layers("Roberta"),
)
