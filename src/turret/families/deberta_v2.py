"""DeBERTa v2 and v3 (He et al. 2021, 2023). Their attention does not use transformers' interface."""

from __future__ import annotations

from turret.families.family import Family

DEBERTA_V2 = Family(
    name="deberta-v2",
    kind="encoder",
    attention=(),
    rows_alone=True,
    lora_targets=("query_proj", "value_proj"),
    head_modules=("pooler", "classifier"),
    classify=lambda part, pooled: part("classifier")(part("dropout")(part("pooler")(pooled[:, None]))),
    head_dropouts=("dropout",),
    positions="table",
)
