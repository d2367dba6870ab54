"""The two moments of AdamW over one row of weights: in float32, or in 8 bits by bitsandbytes.

m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
w <- w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from turret import quantized
from turret.errors import TrainingError

BLOCK = 256  # values with one scale, in 8 bits; bitsandbytes has no other size


class Part(NamedTuple):
    """A part of the row whose weights are updated alike. ratio: its learning rate over the row's."""

    where: slice
    decays: bool
    ratio: float


class Update(NamedTuple):
    """One step. rate: learning rate. steps: how many there are with this one."""

    rate: float
    steps: int
    weight_decay: float
    betas: tuple[float, float]
    eps: float


class Moments(Protocol):
    """The moments of a row of N weights."""

    def step(self, weights: Tensor, gradients: Tensor, update: Update) -> None:
        """Update moments and weights (N,) float32. The gradients are scratch space."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps. They are not copies."""


class Float32Moments:
    """Adam's moments as (N,) float32: 8 bytes a weight.

    Args:
        weights: the row (N,).
        parts: they cover the row; those that decay come first.
    """

    def __init__(self, weights: Tensor, parts: Sequence[Part]) -> None:
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
        self._decayed = max((part.where.stop for part in parts if part.decays), default=0)
        self._faster = [part for part in parts if part.ratio != 1.0]

    def step(self, weights: Tensor, gradients: Tensor, update: Update) -> None:
        beta1, beta2 = update.betas
        self.exp_avg.lerp_(gradients, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        if update.weight_decay:
            weights[: self._decayed].mul_(1 - update.rate * update.weight_decay)
        torch.sqrt(self.exp_avg_sq, out=gradients)
        gradients.div_(math.sqrt(1 - beta2**update.steps)).add_(update.eps)
        value = -update.rate / (1 - beta1**update.steps)
        weights.addcdiv_(self.exp_avg, gradients, value=value)
        for where, _, ratio in self._faster:
            weights[where].addcdiv_(self.exp_avg[where], gradients[where], value=value * (ratio - 1))

    def state(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class EightBitMoments:
    """The moments as one byte each, with a scale for every 256 values: 2 bytes a weight.

    The bytes are indices into bitsandbytes' dynamic map of 256 values (Dettmers et al. 2022, "8-bit Optimizers via
    Block-wise Quantization"). Its operation updates moments and weights.

    Args:
        weights: the row (N,).
        parts: they cover the row. A block never spans two parts.

    Raises:
        TrainingError: bitsandbytes is not installed.
    """

    def __init__(self, weights: Tensor, parts: Sequence[Part]) -> None:
        require_eight_bits()
        functional = quantized.library().functional
        self._update = functional.optimizer_update_8bit_blockwise
        self._maps: tuple[Tensor, Tensor] = (
            functional.create_dynamic_map(signed=True).to(weights.device),
            functional.create_dynamic_map(signed=False).to(weights.device),
        )
        self._parts, self._scales, blocks = list(parts), list[slice](), 0
        for part in self._parts:
            count = -(-(part.where.stop - part.where.start) // BLOCK)
            self._scales.append(slice(blocks, blocks + count))
            blocks += count
        self._moments = [torch.zeros_like(weights, dtype=torch.uint8) for _ in range(2)]
        self._absmax = [weights.new_zeros(blocks) for _ in range(2)]

    def step(self, weights: Tensor, gradients: Tensor, update: Update) -> None:
        (m, v), (m_scale, v_scale), (beta1, beta2) = self._moments, self._absmax, update.betas
        for (where, decays, ratio), blocks in zip(self._parts, self._scales, strict=True):
            self._update(
                "adam",
                gradients[where],
                weights[where],
                m[where],
                v[where],
                beta1,
                beta2,
                0.0,  # of other optimisers
                0.0,
                update.eps,
                update.steps,
                update.rate * ratio,
                *self._maps,
                m_scale[blocks],
                v_scale[blocks],
                weight_decay=update.weight_decay / ratio if decays else 0.0,  # a ratio does not change the decay
            )

    def state(self) -> dict[str, Tensor]:
        names = "exp_avg", "exp_avg_sq"
        moments = dict(zip(names, self._moments, strict=True))
        return moments | {f"{name}_absmax": each for name, each in zip(names, self._absmax, strict=True)}


MOMENTS: dict[str, type[Float32Moments] | type[EightBitMoments]] = {
    "adamw": Float32Moments,
    "adamw8bit": EightBitMoments,
}


def moment_bytes(optimizer: str | None, weights: int) -> int:
    """Bytes of the moments of so many weights, for a recipe's `train.optimizer`."""
    if optimizer == "adamw8bit":
        return 2 * weights + 8 * -(-weights // BLOCK)
    return 8 * weights


def require_eight_bits() -> None:
    """Raise TrainingError if bitsandbytes is not installed."""
    try:
        quantized.library()
    except ImportError as error:
        raise TrainingError(
            f"train.optimizer = \"adamw8bit\" needs bitsandbytes ({error}): pip install 'turret[quantized]', "
            "or leave it out"
        ) from None
