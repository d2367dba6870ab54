"""BERT (Devlin et al. 2019), and what RoBERTa shares with it."""

from __future__ import annotations

from typing import Any

from turret.families.family import Family, FastPaths


def classify(model: Any, pooled: Any) -> Any:
    return model.classifier(model.dropout(model.base_model.pooler(pooled[:, None])))


def bert_layers(stem: str) -> FastPaths:
    """The faster ways that fit layers made as BERT's, whose classes begin with `stem`."""
    added_norms = (f"{stem}SelfOutput", f"{stem}Output")
    return FastPaths(added_norms=added_norms, layers=(f"{stem}Layer",), layout="post-norm")


BERT = Family(
    name="bert",
    kind="encoder",
    attention=("BertSelfAttention",),
    lora_targets=("query", "value"),
    head_modules=("classifier",),
    classify=classify,
    head_dropouts=("dropout",),
    body_excludes=("pooler",),
    positions="table",
    fast=bert_layers("Bert"),
)
