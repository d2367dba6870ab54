"""Gemma 2 (Gemma Team 2024), and Gemma 3, which is like it: norms of 1 + weight, capped scores and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from turret.families.family import Family, FastPaths, OutputLayer
from turret.families.llama import llama_like

if TYPE_CHECKING:
    from torch import Tensor

    from turret.transformer import Model


def capped_vocabulary(model: Model, hidden: Tensor, output: OutputLayer) -> Tensor:
    """cap * tanh(logits / cap), if the configuration has a cap."""
    logits, cap = output(hidden), model.config.final_logit_softcapping
    return logits if cap is None else (logits / cap).tanh() * cap


def gemma_like(name: str, stem: str) -> Family:
    """A decoder like Gemma 2, whose class names begin with `stem`. Its norms and MLP have no faster way."""
    return replace(llama_like(name, stem), vocabulary=capped_vocabulary, fast=FastPaths())


GEMMA2 = replace(gemma_like("gemma2", "Gemma2"), gguf="gemma2")

# Gemma 3 (Gemma Team 2025): the models that read text alone.
GEMMA3 = replace(gemma_like("gemma3_text", "Gemma3"), gguf="gemma3", tag_modules=(), heads_first=("q_norm", "k_norm"))
