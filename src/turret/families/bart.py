"""BART (Lewis et al. 2020), and the encoder-decoders like it."""

from __future__ import annotations

from turret.families.family import Family, last_token


def bart_like(name: str, stem: str, *, head_modules: tuple[str, ...] = ("classification_head",)) -> Family:
    """An encoder-decoder like BART, whose class names begin with `stem`."""
    return Family(
        name=name,
        kind="encoder-decoder",
        attention=(f"{stem}Attention",),
        lora_targets=("q_proj", "v_proj"),
        head_modules=head_modules,
        tag_modules=(),
        classify=lambda part, pooled: part("classification_head")(pooled),
        pooling=last_token,
        positions="table",
        position_module="embed_positions",
        cross_attention=("encoder_attn",),
        source_projections=("k_proj", "v_proj"),
        vocabulary=lambda model, hidden, output: output(hidden) + model.final_logits_bias,
    )


BART = bart_like("bart", "Bart")

# mBART (Liu et al. 2020): BART in many languages.
MBART = bart_like("mbart", "MBart")

# Pegasus (Zhang et al. 2020): an encoder-decoder that was trained to summarize. It has no classifier.
PEGASUS = bart_like("pegasus", "Pegasus", head_modules=())
