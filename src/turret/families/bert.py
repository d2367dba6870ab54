"""BERT (Devlin et al. 2019), and the fast paths it shares with RoBERTa."""

from __future__ import annotations

from turret.families.family import Family, FastPaths


def bert_layers(stem: str) -> FastPaths:
    """The fast paths of layers with BERT's layout, whose class names begin with `stem`."""
    added_norms = (f"{stem}SelfOutput", f"{stem}Output")
    return FastPaths(added_norms=added_norms, layers=(f"{stem}Layer",), layout="post-norm")


BERT = Family(
    name="bert",
    kind="encoder",
    attention=("BertSelfAttention",),
    lora_targets=("query", "value"),
    head_modules=("classifier",),
    classify=lambda part, pooled: part("classifier")(part("dropout")(part("pooler")(pooled[:, None]))),
    head_dropouts=("dropout",),
    body_excludes=("pooler",),
    positions="table",
    fast=bert_layers("Bert"),
)
