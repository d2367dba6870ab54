"""ALBERT (Lan et al. 2020): one layer, or a few, applied several times."""

from __future__ import annotations

from turret.families.family import Family

ALBERT = Family(
    name="albert",
    kind="encoder",
    attention=("AlbertAttention",),
    lora_targets=("query", "value"),
    head_modules=("classifier",),
    classify=lambda part, pooled: part("classifier")(part("dropout")(part("pooler")(pooled).tanh())),
    head_dropouts=("dropout",),
    body_excludes=("pooler",),
    positions="table",
)
