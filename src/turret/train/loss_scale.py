"""Scales the loss of a training in float16, where small gradients would become zero.

The gradients are divided by the same number before they are used. If one overflows, the step is computed again with
half the scale, so no batch is lost. After 2,000 steps in a row without an overflow the scale doubles.

Source: Micikevicius et al. 2018, "Mixed Precision Training"; the numbers are those of `torch.amp.GradScaler`, which
leaves out the step that overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FIRST = 65536.0
GROWTH, BACKOFF = 2.0, 0.5
PATIENCE = 2000  # steps without an overflow after which the scale grows
SMALLEST = 1.0  # below it the loss itself is at fault


@dataclass
class LossScale:
    """The scale now, and the steps since it last changed."""

    value: float = FIRST
    good: int = 0

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale | None:
        """A new scale if the base computes in float16; other precisions have the range of float32 and need none."""
        return cls() if dtype == torch.float16 else None

    def lower(self) -> bool:
        """After an overflow. Returns whether the step is worth computing again."""
        self.value, self.good = self.value * BACKOFF, 0
        return self.value >= SMALLEST

    def passed(self) -> None:
        """After a step without an overflow."""
        self.good += 1
        if self.good == PATIENCE:
            self.value, self.good = self.value * GROWTH, 0
