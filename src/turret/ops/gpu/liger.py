"""Norms, rotary positions and SwiGLU by liger-kernel (`turret[gpu]`), one launch each. Imported on a GPU that has it.

What it buys over torch's own operations: one launch instead of four to nine, and each tensor is read once.
"""

from __future__ import annotations

import torch
from liger_kernel.ops import rms_norm as norms
from liger_kernel.ops import rope
from liger_kernel.ops import swiglu as activations
from liger_kernel.ops.utils import calculate_settings
from torch import Tensor

LLAMA = 0  # liger's number of the norm that rounds like Llama's


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, 1 / sqrt(mean(x^2) + eps)). x: (..., D) -> y (..., D), and (N,) float32."""
    y, _, r, *_ = norms.rms_norm_forward(x, weight, eps, 0.0, LLAMA, True)
    return y, r


def rms_norm_backward(x: Tensor, weight: Tensor, r: Tensor, dy: Tensor) -> Tensor:
    """dx. The weight is frozen. dy stays as it is."""
    rows, settings = x.view(-1, x.shape[-1]), calculate_settings(x.shape[-1])
    return norms.rms_norm_backward(dy, rows, weight, r, 0.0, LLAMA, *settings, False, True, needs_dw=False)[0]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """q: (N, H, D), k: (N, H_kv, D), in place if they are contiguous; cos, sin: (N, D), both halves alike."""
    run = rope.rope_forward if sign > 0 else rope.rope_backward
    with torch.cuda.device_of(q):  # liger launches this one on the current device
        turned = run(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    q, k = (each[0].transpose(0, 1) for each in turned[:2])
    return q, k


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return activations.swiglu_forward(gate, up)[2]


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), in the memory of gate and up."""
    dgate, dup = activations.swiglu_backward(gate, up, dy)
    return dgate, dup
