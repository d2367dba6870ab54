"""RoBERTa (Liu et al. 2019), and the encoders like it."""

from __future__ import annotations

from turret.families.bert import bert_layers
from turret.families.family import Family


def roberta_like(name: str, stem: str) -> Family:
    """An encoder like RoBERTa, whose class names begin with `stem`."""
    return Family(
        name=name,
        kind="encoder",
        attention=(f"{stem}SelfAttention",),
        lora_targets=("query", "value"),
        head_modules=("classifier",),
        classify=lambda part, pooled: part("classifier")(pooled[:, None]),  # its head reads (B, T, D)
        body_excludes=("pooler",),
        positions="table",
        position_offset=lambda config: config.pad_token_id + 1,  # positions begin after the padding index
        fast=bert_layers(stem),
    )


ROBERTA = roberta_like("roberta", "Roberta")

# CamemBERT (Martin et al. 2020): RoBERTa in French.
CAMEMBERT = roberta_like("camembert", "Camembert")

# XLM-RoBERTa (Conneau et al. 2020): RoBERTa in a hundred languages.
XLM_ROBERTA = roberta_like("xlm-roberta", "XLMRoberta")
