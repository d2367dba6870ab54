"""What an adapter does to one frozen linear layer, in `layers.RoutedLinear`: LoRA, DoRA, IA3 and trained biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from turret import quantized
from turret.adapters.batch_context import BatchContext
from turret.errors import AdapterError
from turret.ops.dropout import Masks, dropout
from turret.ops.lora import FrozenProducts, adapted_linear, lora_delta, low_rank
from turret.ops.structs import Lora
from turret.quantized import FourBitProducts


class LoRAFactors(nn.Module):
    """`delta(x) = lora_delta(x; A, B) - lora_delta(x; A0, B0)`, for x: (..., D_in) -> (..., D_out).

    lora_A: (R, D_in) and lora_B: (D_out, R), float32. A0 and B0 are used by PiSSA only: the principal factors that
    training starts from. Subtracting them makes the layer start equal to the base while the base keeps its weights
    (Meng et al. 2024, with the whole base instead of its residual).
    """

    initial_A: Tensor | None
    initial_B: Tensor | None

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = dropout_rate
        self.register_buffer("initial_A", None)
        self.register_buffer("initial_B", None)

    def forward(self, x: Tensor, masks: Masks | None = None, stream: str | None = None) -> Tensor:
        x = x.to(self.lora_A.dtype)
        y = lora_delta(dropout(x, self._rate, masks, stream), self.lora_A, self.lora_B, self.scaling)
        if self.initial_A is not None and self.initial_B is not None:
            y = y - lora_delta(x, self.initial_A, self.initial_B, self.scaling)
        return y

    def with_base(self, layer: nn.Module, x: Tensor, context: BatchContext, stream: str | None = None) -> Tensor:
        """W x + bias + delta(x), in the base's own precision and with little saved for the backward pass."""
        masks = context.masks or Masks()
        if self.initial_A is None and torch.is_grad_enabled():
            lora = Lora(self.lora_A, self.lora_B, self.scaling, self._rate)
            if quantized.in_four_bits(layer):
                packed = FourBitProducts.of(layer)
                y = adapted_linear(x, packed.weight, layer._parameters["bias"], packed, lora, masks, stream)
                return self._beside(layer, x, masks, stream) if y is None else y
            if not quantized.is_packed(layer):
                weight, bias = weight_and_bias(layer)
                if weight.dtype == x.dtype and not weight.requires_grad:
                    y = adapted_linear(x, weight, bias, FrozenProducts(), lora, masks, stream)
                    return self._beside(layer, x, masks, stream) if y is None else y
        return self._beside(layer, x, masks, stream)

    def _beside(self, layer: nn.Module, x: Tensor, masks: Masks, stream: str | None) -> Tensor:
        """The layer's own output and delta(x), added up."""
        y: Tensor = layer(x)
        delta: Tensor = self(x, masks, stream)
        return y + delta.to(y.dtype)

    @property
    def _rate(self) -> float:
        return self.dropout if self.training else 0.0

    def folded_factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the plain LoRA with the same output; PiSSA's has twice the rank and the same scaling."""
        A, B = self.lora_A.detach(), self.lora_B.detach()
        if self.initial_A is None or self.initial_B is None:
            return A, B
        return torch.cat([A, self.initial_A]), torch.cat([B, -self.initial_B], dim=1)  # (2R, D_in), (D_out, 2R)


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight (D_out, D_in) and the bias of a linear layer; GPT-2's Conv1D keeps its weight transposed."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    return (weight if isinstance(layer, nn.Linear) else weight.mT), bias


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """(D_in, D_out) of a linear layer; GPT-2's Conv1D keeps its weight transposed."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D":
        d_in, d_out = layer.get_parameter("weight").shape
        return d_in, d_out
    own: tuple[int | None, ...] = tuple(vars(layer).get(name) for name in ("in_features", "out_features"))
    if quantized.is_packed(layer) and own[0] is not None and own[1] is not None:
        return own[0], own[1]
    raise AdapterError(
        f"LoRA cannot adapt a {type(layer).__name__}: expected a linear layer; name other target_modules"
    )


# --- scaled layers ----------------------------------------------------------------------------------------------------
# A linear layer whose outputs or inputs an adapter scales, with or without LoRA: DoRA, IA3 and trained biases.
#
#     y = output * (W x' + b + B A x') + shift,    x' = input * x
#
# | method | input | output | shift |
# | --- | --- | --- | --- |
# | DoRA (Liu et al. 2024) | 1 | m / norm of the rows of W + B A | b - output * b |
# | IA3 (Liu et al. 2022) | 1, or l in a feed-forward layer | l, or 1 | 0 |
# | a trained bias | 1 | 1 | the new bias - b |
#
# This is the only form there is: rows of such an adapter take it, in a batch of one adapter and in a mixed one.


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

    def merged_parameters(self, layer: nn.Module) -> dict[str, Tensor]:
        """The layer's changed parameters with this merged in: `W' = output (W + B A) input`, `b' = output b + shift`.

        They are computed in float32 and rounded once to the layer's dtypes.

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
        if own.shift is None and (own.output is None or bias is None):
            return merged
        if bias is None:
            raise AdapterError("a layer of the base has no bias to merge a trained one into: export it unmerged")
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
