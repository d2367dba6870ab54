"""BigBird (Zaheer et al. 2020) with full attention, which it computes itself for short texts anyway.

Its block-sparse attention replaces its modules when a text is short, so it is switched off when a base is loaded.
"""

from __future__ import annotations

from turret.families.family import Family

BIG_BIRD = Family(
    name="big_bird",
    kind="encoder",
    attention=(),
    rows_alone=True,
    lora_targets=("query", "value"),
    head_modules=("classifier",),
    classify=lambda part, pooled: part("classifier")(pooled[:, None]),  # its head reads (B, T, D)
    body_excludes=("pooler",),
    unread=("bert.pooler",),
    positions="table",
    loaded_with={"attention_type": "original_full"},
)
