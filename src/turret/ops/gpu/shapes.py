"""The results of the operations of a forward pass on the meta device: shapes, from which a plan predicts memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    return None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def add_lora(
    y: Sequence[Tensor],
    x: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    plus: Tensor | None,
    scaling: float,
    keys: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    return x.new_empty(len(x), sum(each.shape[0] for each in A))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    most: int,
    most_keys: int,
    causal: bool,
    window: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
