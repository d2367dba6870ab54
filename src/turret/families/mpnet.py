"""MPNet (Song et al. 2020). Its attention, with a bias by relative position, does not use transformers' interface."""

from __future__ import annotations

from turret.families.family import Family

PADDING = 1  # fixed in transformers' classes, regardless of the configuration

MPNET = Family(
    name="mpnet",
    kind="encoder",
    attention=(),
    rows_alone=True,
    lora_targets=("q", "v"),
    head_modules=("classifier",),
    classify=lambda part, pooled: part("classifier")(pooled[:, None]),  # its head reads (B, T, D)
    body_excludes=("pooler",),
    positions="table",
    position_offset=lambda config: PADDING + 1,
)
