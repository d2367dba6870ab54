"""A linear layer whose outputs or inputs an adapter scales, with or without LoRA: DoRA, IA3 and trained biases.

    y = output * (W x' + b + B A x') + shift,    x' = input * x

| method | input | output | shift |
| --- | --- | --- | --- |
| DoRA (Liu et al. 2024) | 1 | m / norm of the rows of W + B A | b - output * b |
| IA3 (Liu et al. 2022) | 1, or l in a feed-forward layer | l, or 1 | 0 |
| a trained bias | 1 | 1 | the new bias - b |

This is the only form there is: rows of such an adapter take it, in a batch of one adapter and in a mixed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from turret import quantized
from turret.errors import AdapterError
from turret.ops.lora import low_rank

Factors = tuple[Tensor, Tensor]


class LayerChange(Protocol):
    """What one adapter does to one linear layer, beyond adding low-rank factors."""

    def __call__(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (..., D_in) -> (..., D_out), in x's precision; base computes W x + b."""
        ...

    def to(self, device: torch.device) -> LayerChange:
        """The same on a device."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of its numbers."""
        ...


@dataclass(frozen=True)
class ScaledLayer:
    """What one adapter does to one linear layer; a part that is None changes nothing.

    Args:
        factors: A (R, D_in), and B (D_out, R) times LoRA's scaling.
        input: (D_in,).
        output: (D_out,).
        shift: (D_out,).
    """

    factors: Factors | None = None
    input: Tensor | None = None
    output: Tensor | None = None
    shift: Tensor | None = None

    def __call__(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (..., D_in) -> (..., D_out), in x's precision; base computes W x + b."""
        scaled = x if self.input is None else x * self.input.to(x.dtype)
        y = base(scaled)
        if self.factors is not None:
            A, B = self.factors
            y = y + low_rank(scaled, A.to(x.dtype), B.mT.to(x.dtype))
        if self.output is not None:
            y = y * self.output.to(y.dtype)
        return y if self.shift is None else y + self.shift.to(y.dtype)

    def to(self, device: torch.device) -> ScaledLayer:
        """The same on a device."""
        factors = None if self.factors is None else (self.factors[0].to(device), self.factors[1].to(device))
        input, output, shift = (None if t is None else t.to(device) for t in (self.input, self.output, self.shift))
        return ScaledLayer(factors, input, output, shift)

    def merged(self, layer: nn.Module) -> dict[str, Tensor]:
        """The layer's parameters with this merged in, in their dtypes: `W' = output (W + B A) input`.

        Raises:
            AdapterError: the layer has no bias that could hold the shift.
        """
        weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
        W = quantized.dense_weight(layer).float()  # (D_out, D_in)
        own = self.to(weight.device)
        if own.factors is not None:
            W = W + own.factors[1].float() @ own.factors[0].float()
        W = W if own.input is None else W * own.input.float()
        W = W if own.output is None else W * own.output.float()[:, None]
        merged = {"weight": (W if isinstance(layer, nn.Linear) else W.mT).to(weight.dtype)}
        if bias is None:
            if own.shift is not None:
                raise AdapterError("a layer of the base has no bias to merge a trained one into: export it unmerged")
            return merged
        b = bias.float() if own.output is None else bias.float() * own.output.float()
        return merged | {"bias": (b if own.shift is None else b + own.shift.float()).to(bias.dtype)}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of its numbers."""
        return tuple(t for t in (*(self.factors or ()), self.input, self.output, self.shift) if t is not None)


def dora(layer: nn.Module, A: Tensor, B: Tensor, magnitude: Tensor) -> ScaledLayer:
    """DoRA on a layer, on its device. A: (R, D_in); B: (D_out, R), scaled; magnitude: (D_out,)."""
    A, B, magnitude = (each.to(layer.get_parameter("weight").device) for each in (A, B, magnitude))
    gain = magnitude.float() / torch.linalg.norm(quantized.dense_weight(layer).float() + B.float() @ A.float(), dim=1)
    bias = layer._parameters["bias"]
    shift = None if bias is None else bias.float() * (1 - gain)
    return ScaledLayer((A, B), output=gain, shift=shift)
