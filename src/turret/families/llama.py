"""Llama (Touvron et al. 2023), and decoders with the same layout."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from turret.families.family import Family, FastPaths, HeadParts, last_token

if TYPE_CHECKING:
    from torch import Tensor


def classify(part: HeadParts, pooled: Tensor) -> Tensor:
    return part("score")(pooled)


def llama_like(name: str, stem: str) -> Family:
    """A decoder with rotary positions, RMS norms and a gated MLP, whose class names begin with `stem`."""
    return Family(
        name=name,
        kind="decoder",
        attention=(f"{stem}Attention",),
        lora_targets=("q_proj", "v_proj"),
        head_modules=("score",),
        classify=classify,
        tag_modules=("score",),
        tag=lambda part, hidden: part("score")(part("dropout")(hidden)),
        pooling=last_token,
        vllm_lora=True,
        fast=FastPaths(
            rms_norms=(f"{stem}RMSNorm",),
            gated_mlps=(f"{stem}MLP",),
            layers=(f"{stem}DecoderLayer",),
            layout="pre-norm",
        ),
    )


# llama.cpp rotates neighbouring pairs, transformers the two halves of a head, so the rows of q and k change places.
LLAMA = replace(llama_like("llama", "Llama"), gguf="llama", gguf_rotary=("q_proj", "k_proj"))

# Qwen 2 (Yang et al. 2024).
QWEN2 = replace(llama_like("qwen2", "Qwen2"), gguf="qwen2")

# Qwen 3 (Yang et al. 2025).
QWEN3 = replace(llama_like("qwen3", "Qwen3"), gguf="qwen3")
