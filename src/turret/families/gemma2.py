"""Gemma 2 (Gemma Team 2024), and Gemma 3, which is like it: norms of 1 + weight, capped scores and logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turret.families.family import Family, OutputLayer, last

if TYPE_CHECKING:
    from torch import Tensor

    from turret.transformer import Model


def capped_vocabulary(model: Model, hidden: Tensor, output: OutputLayer) -> Tensor:
    """cap * tanh(logits / cap), if the configuration has a cap."""
    logits, cap = output(hidden), model.config.final_logit_softcapping
    return logits if cap is None else (logits / cap).tanh() * cap


def gemma_like(name: str, stem: str) -> Family:
    """A decoder like Gemma 2, whose class names begin with `stem`."""
    return Family(
        name=name,
        kind="decoder",
        attention=(f"{stem}Attention",),
        lora_targets=("q_proj", "v_proj"),
        head_modules=("score",),
        classify=lambda model, pooled: model.score(pooled),
        pooling=last,
        vocabulary=capped_vocabulary,
        vllm_lora=True,
    )


GEMMA2 = gemma_like("gemma2", "Gemma2")
