"""LoRA: its formula, the factors of one adapter, and the routed linear layer that adds them to a frozen layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from turret import quantized
from turret.adapters.autograd import FunctionContext, Gradients, apply
from turret.adapters.batch_context import BARE, BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.dropout import Mask, Masks, dropout
from turret.adapters.fused.int8 import FrozenProducts, products
from turret.adapters.fused.residual import RecomputedNorm, restored, to_save
from turret.adapters.scaled import ScaledLayer
from turret.errors import AdapterError
from turret.ops.cpu import LARGEST, DropoutArguments, Library, usable
from turret.quantized import FourBitProducts


def lora_delta(x: Tensor, A: Tensor, B: Tensor, scaling: float, p: float = 0.0) -> Tensor:
    """`scaling * B A dropout(x)`: what LoRA adds to `W x`, and the reference of every faster path.

    Args:
        x: (..., D_in).
        A: (R, D_in).
        B: (D_out, R).
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.
        p: rate of dropout.

    Returns:
        (..., D_out).

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    h = dropout(x, p) @ A.mT  # (..., R)
    return (h * scaling) @ B.mT  # the smallest tensor is scaled


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

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.lora_A.dtype)
        y = lora_delta(x, self.lora_A, self.lora_B, self.scaling, self._rate)
        if self.initial_A is not None and self.initial_B is not None:
            y = y - lora_delta(x, self.initial_A, self.initial_B, self.scaling)
        return y

    def with_base(self, layer: nn.Module, x: Tensor, context: BatchContext) -> Tensor:
        """W x + bias + delta(x), in the base's own precision and with little saved for the backward pass."""
        if quantized.packed(layer):
            return self._with_packed(layer, x, context)
        weight, bias = weight_and_bias(layer)
        A, B = self.lora_A, self.lora_B
        if self.initial_A is None and self._trains_beside(weight, x):
            masks, p = context.masks or Masks(), self._rate
            if (library := _kernels(x, weight, A, B)) is not None:
                lora = KernelProducts(self.scaling, masks.arguments(p), library)
                return apply(_Adapted, x, weight, bias, A, B, products(context, x, weight, bias), lora)
            if enabled("lora_gradient"):
                mask = masks.mask(x, p) if p > 0.0 else None
                return apply(_Adapted, x, weight, bias, A, B, FrozenProducts(), TorchProducts(self.scaling, mask))
        return self._beside(layer, x)

    def _with_packed(self, layer: nn.Module, x: Tensor, context: BatchContext) -> Tensor:
        """The same for a layer with a quantized weight, on any device; in 4 bits only x and h are saved."""
        if self.initial_A is not None or not torch.is_grad_enabled() or not quantized.in_four_bits(layer):
            return self._beside(layer, x)
        base, masks, p = FourBitProducts.of(layer), context.masks or Masks(), self._rate
        lora: LoRAProducts
        if (library := _kernels(x, x, self.lora_A, self.lora_B)) is not None:
            lora = KernelProducts(self.scaling, masks.arguments(p), library)
        else:
            lora = TorchProducts(self.scaling, masks.mask(x, p) if p > 0.0 else None)
        return apply(_Adapted, x, base.weight, layer._parameters["bias"], self.lora_A, self.lora_B, base, lora)

    def _beside(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The layer's own output and delta(x), added up."""
        y: Tensor = layer(x)
        delta: Tensor = self(x)
        return y + delta.to(y.dtype)

    @property
    def _rate(self) -> float:
        return self.dropout if self.training else 0.0

    def by_kernels(self, weight: Tensor) -> bool:
        """Whether the kernels can add these factors to a frozen layer, for x on the CPU in the weight's dtype."""
        return self.initial_A is None and not weight.requires_grad and _fits(self.lora_A, self.lora_B)

    def _trains_beside(self, weight: Tensor, x: Tensor) -> bool:
        """Whether base and delta can be one operation: on the CPU, with gradients, the base frozen and in x's dtype."""
        here = torch.is_grad_enabled() and x.device.type == "cpu"
        return here and weight.dtype == x.dtype and not weight.requires_grad

    def folded(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the plain LoRA with the same output; PiSSA's has twice the rank and the same scaling."""
        A, B = self.lora_A.detach(), self.lora_B.detach()
        if self.initial_A is None or self.initial_B is None:
            return A, B
        return torch.cat([A, self.initial_A]), torch.cat([B, -self.initial_B], dim=1)  # (2R, D_in), (D_out, 2R)


class BaseProducts(Protocol):
    """The products of a frozen matrix W (D_out, D_in) with rows of tokens."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b: (N, D_in) -> (N, D_out), a new tensor."""

    def backward(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy W: (N, D_out) -> (N, D_in), a new tensor."""


class LoRAProducts(Protocol):
    """The products of LoRA on a frozen matrix, and their gradients. x: (N, D_in), y: (N, D_out), h: (N, R).

    s = scaling / (1 - p);  h = (x mask) A^T;  y += s h B^T;
    dB = s dy^T h;  dh = s dy B;  dA = dh^T (x mask);  dx += (dh A) mask.
    """

    def forward(self, x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
        """Add to y, and give h."""

    def backward(
        self, x: Tensor, A: Tensor, B: Tensor, h: Tensor, dy: Tensor, dx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(dA, dB) in float32; add to dx if it is given."""


@dataclass(frozen=True)
class TorchProducts:
    """In torch, multiplied in x's precision and added up in float32."""

    scaling: float
    mask: Mask | None

    @property
    def _scale(self) -> float:
        return self.scaling * (1.0 if self.mask is None else self.mask.scale)

    def forward(self, x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
        h = (x if self.mask is None else self.mask.of(x)) @ A.to(x.dtype).mT
        y.addmm_(h, B.to(x.dtype).mT, alpha=self._scale)
        return h

    def backward(
        self, x: Tensor, A: Tensor, B: Tensor, h: Tensor, dy: Tensor, dx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        A, B, mask = A.to(x.dtype), B.to(x.dtype), self.mask
        dh = (dy @ B).mul_(self._scale)
        if dx is not None and mask is None:
            dx.addmm_(dh, A)
        elif dx is not None and mask is not None:
            dx.add_(mask.of(dh @ A))
        return (dh.mT @ (x if mask is None else mask.of(x))).float(), (dy.mT @ h).float().mul_(self._scale)


@dataclass(frozen=True)
class KernelProducts:
    """By the kernels, multiplied and added up in float32."""

    scaling: float
    dropped: DropoutArguments
    library: Library

    def forward(self, x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
        return self.library.lora(x, A, B, self.scaling * self.dropped.scale, self.dropped, y)

    def backward(
        self, x: Tensor, A: Tensor, B: Tensor, h: Tensor, dy: Tensor, dx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.library.lora_backward(x, A, B, self.scaling * self.dropped.scale, self.dropped, h, dy, dx)


class _AdaptedContext(FunctionContext, Protocol):
    base: BaseProducts
    lora: LoRAProducts
    norm: RecomputedNorm | None


class _Adapted(torch.autograd.Function):
    """y = W x + b + LoRA's part, with W and b frozen. x: (..., D_in) -> (..., D_out).

    If x came from a norm, the norm's input is saved instead of x.
    """

    @staticmethod
    def forward(
        ctx: _AdaptedContext,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        base: BaseProducts,
        lora: LoRAProducts,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, D_in)
        y = base.forward(rows, weight, bias)
        h = lora.forward(rows, A, B, y)
        saved, ctx.norm = to_save(x)
        ctx.base, ctx.lora = base, lora
        ctx.save_for_backward(saved, weight, A, B, h)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _AdaptedContext, *gradients: Tensor) -> Gradients:
        saved, weight, A, B, h = ctx.saved_tensors
        rows = restored(saved, ctx.norm).reshape(-1, saved.shape[-1])
        dy = gradients[0].reshape(-1, len(B)).contiguous()
        dx = ctx.base.backward(dy, weight) if ctx.needs_input_grad[0] else None
        dA, dB = ctx.lora.backward(rows, A, B, h, dy, dx)
        return None if dx is None else dx.view(saved.shape), None, None, dA, dB, None, None


def _kernels(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Library | None:
    """The kernels, if they take these sizes and layouts."""
    if x.numel() >= LARGEST or not x.is_contiguous() or not _fits(A, B) or not enabled("lora_kernel"):
        return None
    return usable(x, weight)


def _fits(A: Tensor, B: Tensor) -> bool:
    if A.shape[1] % 32 or B.shape[0] % 32 or not A.is_contiguous() or not B.is_contiguous():
        return False
    return A.dtype == B.dtype == torch.float32


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight (D_out, D_in) and the bias of a linear layer; GPT-2's Conv1D keeps its weight transposed."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    return (weight if isinstance(layer, nn.Linear) else weight.mT), bias


class RoutedLinear(nn.Module):
    """`y = W x + delta_slot(row)(x)`: a frozen linear layer, and the factors of any number of slots.

    x: (B, T, D_in) or (B, D_in) padded, with a slot for each row; (1, N, D_in) unpadded, with a slot for each span of
    tokens. Rows without an adapter here get exactly the base layer's output.
    """

    def __init__(self, base_layer: nn.Module, context: BatchContext, stream: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = nn.ModuleDict()
        self.scaled: dict[int, ScaledLayer] = {}  # by slot, for the methods that scale
        self.context = context
        self.stream = stream

    @property
    def weight(self) -> Tensor:
        """The base's own weight: T5 reads its dtype, GPT-2's initialisation its shape."""
        weight = self.base_layer._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer._parameters["bias"]

    def factors(self, slot: int) -> LoRAFactors | None:
        """The factors that a slot adds to this layer, or None."""
        if slot == BARE or str(slot) not in self.slots:
            return None
        factors = self.slots[str(slot)]
        assert isinstance(factors, LoRAFactors)
        return factors

    def forward(self, x: Tensor) -> Tensor:
        if self.context.adapter_pool is not None:
            return self.context.adapter_pool.linear(self, x)
        slot = self.context.single()
        if slot is not None and (scaled := self.scaled.get(slot)) is not None:
            return scaled(self.base_layer, x)
        if slot is not None and (factors := self.factors(slot)) is not None:
            return factors.with_base(self.base_layer, x, self.context)
        y: Tensor = self.base_layer(x)  # (B, T, D_out)
        if slot is not None:
            return y
        if self.context.lengths is not None and x.dim() == 2:
            return y  # a pooler inside the body takes unpadded tokens for one row; its output is never used
        dim, groups = self.context.places_by_slot(self.stream, x.device)
        for slot, index in groups.items():
            if (scaled := self.scaled.get(slot)) is not None:
                y = y.index_copy(dim, index, scaled(self.base_layer, x.index_select(dim, index)).to(y.dtype))
            elif slot != BARE and str(slot) in self.slots:
                delta = self.slots[str(slot)](x.index_select(dim, index)).to(y.dtype)
                y = y.index_add(dim, index, delta)
        return y


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
