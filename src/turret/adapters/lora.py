"""LoRA: its formula, and the factors of one adapter, which `layers.RoutedLinear` adds to a frozen layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turret import quantized
from turret.adapters.batch_context import BatchContext
from turret.errors import AdapterError
from turret.ops.dropout import Masks, dropout
from turret.ops.lora import FrozenProducts, adapted, lora_delta
from turret.ops.structs import Lora
from turret.quantized import FourBitProducts


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scaling: float, *, transposed: bool = False) -> Tensor:
    """`W' = W + scaling * B A`, summed in float32 and rounded once to W's dtype; a new tensor.

    W: (D_out, D_in), or (D_in, D_out) if `transposed` (GPT-2's Conv1D). A: (R, D_in), B: (D_out, R).
    """
    delta = scaling * (B.float() @ A.float())  # (D_out, D_in)
    return (W.float() + (delta.mT if transposed else delta)).to(W.dtype)


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
                y = adapted(x, packed.weight, layer._parameters["bias"], packed, lora, masks, stream)
                return self._beside(layer, x, masks, stream) if y is None else y
            if not quantized.packed(layer):
                weight, bias = weight_and_bias(layer)
                if weight.dtype == x.dtype and not weight.requires_grad:
                    y = adapted(x, weight, bias, FrozenProducts(), lora, masks, stream)
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

    def folded(self) -> tuple[Tensor, Tensor]:
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


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(D_in, D_out) of a linear layer; GPT-2's Conv1D keeps its weight transposed."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D":
        d_in, d_out = layer.get_parameter("weight").shape
        return d_in, d_out
    own: tuple[int | None, ...] = tuple(vars(layer).get(name) for name in ("in_features", "out_features"))
    if quantized.packed(layer) and own[0] is not None and own[1] is not None:
        return own[0], own[1]
    raise AdapterError(
        f"LoRA cannot adapt a {type(layer).__name__}: expected a linear layer; name other target_modules"
    )
