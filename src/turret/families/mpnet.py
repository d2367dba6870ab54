"""MPNet (Song et al. 2020). It computes its attention itself, with a bias by relative position."""

from __future__ import annotations

from turret.families.family import Family

PADDING = 1  # fixed in transformers' classes, whatever the configuration says

MPNET = Family(
    name="mpnet",
    kind="encoder",
    attention=(),
    rows_alone=True,
    lora_targets=("q", "v"),
    head_modules=("classifier",),
    classify=lambda model, pooled: model.classifier(pooled[:, None]),  # its head reads the first token of (B, T, D)
    body_excludes=("pooler",),
    positions="table",
    position_offset=lambda config: PADDING + 1,
)
