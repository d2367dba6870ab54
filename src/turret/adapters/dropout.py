"""Dropout that does not cost more than the layer it guards. Knows tensors; refuses to know what they mean."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 1 << 16  # a rate is kept to this many steps


def dropout(x: Tensor, p: float) -> Tensor:
    """x * mask / (1 - p), mask ~ Bernoulli(1 - p) an element; p is rounded to 1/65536.

    On the CPU torch draws one double an element, which in attention takes longer than the two matrix products beside
    it. Here one draw of 64 bits serves four elements, from the same generator.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu":
        return torch.nn.functional.dropout(x, p)
    threshold = round(p * STEPS)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - STEPS // 2
    return x * keep.to(x.dtype).mul_(STEPS / (STEPS - threshold))
