"""ELECTRA (Clark et al. 2020): the discriminator."""

from __future__ import annotations

from turret.families.bert import bert_layers
from turret.families.family import Family

ELECTRA = Family(
    name="electra",
    kind="encoder",
    attention=("ElectraSelfAttention",),
    lora_targets=("query", "value"),
    head_modules=("classifier",),
    classify=lambda part, pooled: part("classifier")(pooled[:, None]),  # its head reads (B, T, D)
    positions="table",
    fast=bert_layers("Electra"),
)
