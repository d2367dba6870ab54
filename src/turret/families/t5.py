"""T5 (Raffel et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from turret.families.family import Family, FastPaths, RelativeBias, last


def classify(model: Any, pooled: Any) -> Any:
    return model.classification_head(pooled)


def vocabulary(model: Any, hidden: Any, output: Callable[[Any], Any]) -> Any:
    """The output layer; where it is tied to the embeddings, hidden states are scaled before it."""
    return output(hidden * model.config.d_model**-0.5 if model.config.scale_decoder_outputs else hidden)


def owns_bias(module: Any) -> bool:
    return bool(module.has_relative_attention_bias)


def bias(module: Any, relative: Any) -> Any:
    """Bias for relative positions key - query: (T, S) int64 -> (1, H, T, S)."""
    buckets = module._relative_position_bucket(
        relative,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    return module.relative_attention_bias(buckets).permute(2, 0, 1)[None]  # (T, S, H) -> (1, H, T, S)


T5 = Family(
    name="t5",
    kind="encoder-decoder",
    attention=("T5Attention",),
    lora_targets=("q", "v"),
    head_modules=("classification_head",),
    classify=classify,
    pooling=last,
    positions="relative",
    relative_bias=RelativeBias("compute_bias", owns_bias, bias),
    cross_attention=("EncDecAttention",),
    source_projections=("k", "v"),
    vocabulary=vocabulary,
    fast=FastPaths(rms_norms=("T5LayerNorm",), narrow_norms=True),
)
