"""Llama (Touvron et al. 2023), and the decoders that are made like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from turret.families.family import Family, FastPaths, last, own_window


def classify(model: Any, pooled: Any) -> Any:
    return model.score(pooled)


def llama_like(name: str, stem: str, *, window: Callable[[Any], int | None] = own_window) -> Family:
    """A decoder of rotary positions, RMS norms and a gated MLP, whose classes begin with `stem`."""
    return Family(
        name=name,
        kind="decoder",
        attention=(f"{stem}Attention",),
        lora_targets=("q_proj", "v_proj"),
        head_modules=("score",),
        classify=classify,
        pooling=last,
        window=window,
        vllm_lora=True,
        fast=FastPaths(
            rms_norms=(f"{stem}RMSNorm",),
            gated_mlps=(f"{stem}MLP",),
            layers=(f"{stem}DecoderLayer",),
            layout="pre-norm",
        ),
    )


LLAMA = llama_like("llama", "Llama")
