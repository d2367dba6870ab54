"""T5 (Raffel et al. 2020), FLAN-T5, and the encoder-decoders like them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turret.families.family import Family, FastPaths, OutputLayer, RelativeBias, Vocabulary, last_token, project

if TYPE_CHECKING:
    from torch import Tensor

    from turret.transformer import Model, Submodule


def scaled_vocabulary(model: Model, hidden: Tensor, output: OutputLayer) -> Tensor:
    """Logits. If the output layer is tied to the embeddings, hidden states are scaled first."""
    return output(hidden * model.config.d_model**-0.5 if model.config.scale_decoder_outputs else hidden)


def owns_bias(module: Submodule) -> bool:
    return bool(module.has_relative_attention_bias)


def bias(module: Submodule, relative: Tensor) -> Tensor:
    """The bias for relative positions, key - query: (T, S) int64 -> (1, H, T, S)."""
    buckets = module._relative_position_bucket(
        relative,
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    values: Tensor = module.relative_attention_bias(buckets)  # (T, S, H)
    return values.permute(2, 0, 1)[None]  # (1, H, T, S)


def t5_like(name: str, stem: str, *, vocabulary: Vocabulary = project) -> Family:
    """An encoder-decoder like T5, whose class names begin with `stem`."""
    return Family(
        name=name,
        kind="encoder-decoder",
        attention=(f"{stem}Attention",),
        lora_targets=("q", "v"),
        head_modules=("classification_head",),
        tag_modules=(),
        classify=lambda part, pooled: part("classification_head")(pooled),
        pooling=last_token,
        positions="relative",
        relative_bias=RelativeBias("compute_bias", owns_bias, bias),
        cross_attention=("EncDecAttention",),
        source_projections=("k", "v"),
        vocabulary=vocabulary,
        fast=FastPaths(rms_norms=(f"{stem}LayerNorm",), narrow_norms=True),
    )


T5 = t5_like("t5", "T5", vocabulary=scaled_vocabulary)

# mT5 (Xue et al. 2021): T5 in a hundred languages.
MT5 = t5_like("mt5", "MT5")
