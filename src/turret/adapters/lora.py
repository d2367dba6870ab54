"""LoRA as numbers: the factors of one adapter, and the routed linear layer that adds them to a frozen one.

Knows tensors and slots. Refuses to know which layers a model has, files and training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters.batch_context import BARE, BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.dropout import Mask, Masks, dropout
from turret.adapters.fused.int8 import FrozenProducts, products
from turret.adapters.fused.norms import kept, made
from turret.errors import AdapterError
from turret.kernels import LARGEST, NO_DROPOUT, DropoutArguments, Library, usable


def lora_delta(x: Tensor, A: Tensor, B: Tensor, scaling: float, p: float = 0.0) -> Tensor:
    """`scaling * B A dropout(x)`: what LoRA adds to `W x`. The reference of every faster way.

    Args:
        x: (..., D_in).
        A: (R, D_in).
        B: (D_out, R).
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.
        p: rate of dropout.

    Returns:
        (..., D_out).

    Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models.
    """
    h = dropout(x, p) @ A.mT  # (..., R)
    return (h * scaling) @ B.mT  # scaled where the tensor is smallest


class LoRAFactors(nn.Module):
    """`delta(x) = scaling * (dropout(x) A^T B^T - x A0^T B0^T)`, for x: (..., D_in) -> (..., D_out).

    lora_A: (R, D_in) and lora_B: (D_out, R), float32. A0 and B0 are there for PiSSA only: the principal factors that
    training starts from, subtracted so that the layer starts equal to the base and the base keeps its weights
    (Meng et al. 2024, written with the base whole instead of its residual).
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
        y = lora_delta(x, self.lora_A, self.lora_B, self.scaling, self.dropout if self.training else 0.0)
        if self.initial_A is not None and self.initial_B is not None:
            y = y - lora_delta(x, self.initial_A, self.initial_B, self.scaling)
        return y

    def with_base(self, layer: nn.Module, x: Tensor, context: BatchContext) -> Tensor:
        """W x + bias + delta(x), in the base's own precision and with little kept for the backward pass."""
        weight, bias = _matrix(layer)
        if self.initial_A is None and self._trains_beside(weight, x):
            p = self.dropout if self.training else 0.0
            masks, own = context.masks or Masks(), (x, weight, bias, self.lora_A, self.lora_B)
            added: Tensor
            if (library := _kernels(x, weight, self.lora_A, self.lora_B)) is not None:
                dropped, by = masks.dropped(p) if p > 0.0 else NO_DROPOUT, products(context, x, weight, bias)
                added = _AdaptedByKernels.apply(*own, dropped, self.scaling, library, by)  # type: ignore[no-untyped-call]
                return added
            if enabled("lora_gradient"):
                mask = masks.mask(x, p) if p > 0.0 else None
                added = _Adapted.apply(*own, mask, self.scaling)  # type: ignore[no-untyped-call]
                return added
        y: Tensor = layer(x)
        delta: Tensor = self(x)
        return y + delta.to(y.dtype)

    def by_kernels(self, weight: Tensor) -> bool:
        """Whether the kernels compute what it adds to a frozen layer, x being of the weight's dtype and on the CPU."""
        return self.initial_A is None and not weight.requires_grad and _fits(self.lora_A, self.lora_B)

    def _trains_beside(self, weight: Tensor, x: Tensor) -> bool:
        """Whether one function can compute both: training on the CPU, with the base frozen and in x's precision."""
        here = torch.is_grad_enabled() and x.device.type == "cpu"
        return here and weight.dtype == x.dtype and not weight.requires_grad

    def folded(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the plain LoRA with the same output; PiSSA's has twice the rank and the same scaling."""
        A, B = self.lora_A.detach(), self.lora_B.detach()
        if self.initial_A is None or self.initial_B is None:
            return A, B
        return torch.cat([A, self.initial_A]), torch.cat([B, -self.initial_B], dim=1)  # (2R, D_in), (D_out, 2R)


class _Adapted(torch.autograd.Function):
    """y = W x + b + s (x mask) A^T B^T, multiplied in x's precision, added up in float32; s = scaling / (1 - p).

    h = (x mask) A^T;  dB = s dy^T h;  dh = s dy B;  dA = dh^T (x mask);  dx = dy W + (dh A) mask.
    x: (..., D_in), weight: (D_out, D_in) and bias: (D_out,) or none, frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        mask: Mask | None,
        scaling: float,
    ) -> Tensor:
        A, B = A.to(x.dtype), B.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])  # (N, D_in)
        h = (rows if mask is None else mask.of(rows)) @ A.mT  # (N, R)
        ctx.scaling, ctx.shape, ctx.mask = scaling * (1.0 if mask is None else mask.scale), x.shape, mask
        y = nn.functional.linear(rows, weight, bias).addmm_(h, B.mT, alpha=ctx.scaling)
        ctx.save_for_backward(rows, weight, A, B, h)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, weight, A, B, h = ctx.saved_tensors
        mask = ctx.mask
        dy = gradients[0].reshape(-1, B.shape[0])
        dh = (dy @ B).mul_(ctx.scaling)  # (N, R)
        dB = (dy.mT @ h).float().mul_(ctx.scaling)
        dA = (dh.mT @ (rows if mask is None else mask.of(rows))).float()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx = (dx.addmm_(dh, A) if mask is None else dx.add_(mask.of(dh @ A))).view(ctx.shape)
        return dx, None, None, dA, dB, None, None


class _AdaptedByKernels(torch.autograd.Function):
    """The same, in x's precision for W alone: what the adapter adds is multiplied and added up in float32.

    Of an x that a norm made, what the norm was given is kept in its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        dropped: DropoutArguments,
        scaling: float,
        library: Library,
        by: FrozenProducts,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, D_in)
        y = by.forward(rows, weight, bias)
        ctx.scaling, ctx.dropped, ctx.library, ctx.by = scaling * dropped.scale, dropped, library, by
        h = library.lora(rows, A, B, ctx.scaling, dropped, y)
        own, ctx.norm = kept(x)
        ctx.save_for_backward(own, weight, A, B, h)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, A, B, h = ctx.saved_tensors
        rows = made(x, ctx.norm).reshape(-1, x.shape[-1])
        dy = gradients[0].reshape(-1, len(B)).contiguous()
        dx = ctx.by.backward(dy, weight) if ctx.needs_input_grad[0] else None
        dA, dB = ctx.library.lora_backward(rows, A, B, ctx.scaling, ctx.dropped, h, dy, dx)
        return None if dx is None else dx.view(x.shape), None, None, dA, dB, None, None, None, None


def _kernels(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Library | None:
    """The kernels, where their vectors fit the factors and all lies as they read it."""
    if x.numel() >= LARGEST or not x.is_contiguous() or not _fits(A, B) or not enabled("lora_kernel"):
        return None
    return usable(x, weight)


def _fits(A: Tensor, B: Tensor) -> bool:
    if A.shape[1] % 32 or B.shape[0] % 32 or not A.is_contiguous() or not B.is_contiguous():
        return False
    return A.dtype == B.dtype == torch.float32


def _matrix(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(D_out, D_in) and the bias of a linear layer; GPT-2's Conv1D keeps its weight transposed."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    return (weight if isinstance(layer, nn.Linear) else weight.mT), bias


class RoutedLinear(nn.Module):
    """`y = W x + delta_slot(row)(x)`: a frozen linear layer and the factors of any number of slots.

    x: (B, T, D_in) or (B, D_in) padded, one slot a row; (1, N, D_in) unpadded, one slot a span of tokens. A row of
    slot 0, or of a slot without factors here, is bit-equal to the base.
    """

    def __init__(self, base_layer: nn.Module, context: BatchContext, stream: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = nn.ModuleDict()
        self.context = context
        self.stream = stream

    @property
    def weight(self) -> Tensor:
        """The base's own weight: T5 looks at its dtype, GPT-2's initialisation at its shape."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    def factors(self, slot: int) -> LoRAFactors | None:
        """What a slot adds here, or None."""
        if slot == BARE or str(slot) not in self.slots:
            return None
        factors = self.slots[str(slot)]
        assert isinstance(factors, LoRAFactors)
        return factors

    def forward(self, x: Tensor) -> Tensor:
        if self.context.adapter_pool is not None:
            return self.context.adapter_pool.linear(self, x)
        slot = self.context.single()
        if slot is not None and (factors := self.factors(slot)) is not None:
            return factors.with_base(self.base_layer, x, self.context)
        y: Tensor = self.base_layer(x)  # (B, T, D_out)
        if slot is not None:
            return y
        if self.context.lengths is not None and x.dim() == 2:
            return y  # a pooler inside the body took unpadded tokens for one row; its output is never used
        if self.context.lengths is not None:
            groups = self.context.tokens_by_slot(self.stream, x.device)
            return self._add_groups(y, x, groups, dim=1)
        rows = {slot: torch.tensor(rows, device=x.device) for slot, rows in self.context.rows_by_slot().items()}
        return self._add_groups(y, x, rows, dim=0)

    def _add_groups(self, y: Tensor, x: Tensor, groups: dict[int, Tensor], dim: int) -> Tensor:
        for slot, index in groups.items():
            if slot != BARE and str(slot) in self.slots:
                delta = self.slots[str(slot)](x.index_select(dim, index)).to(y.dtype)
                y = y.index_add(dim, index, delta)
        return y


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(D_in, D_out) of a linear layer; GPT-2's Conv1D keeps its weight transposed."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D":
        weight: Any = layer.weight
        return int(weight.shape[0]), int(weight.shape[1])
    raise AdapterError(
        f"LoRA cannot adapt a {type(layer).__name__}: expected a linear layer; name other target_modules"
    )


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scaling: float, *, transposed: bool = False) -> Tensor:
    """`W' = W + scaling * B A`, summed in float32 and rounded once to W's dtype; a new tensor.

    W: (D_out, D_in), or (D_in, D_out) where `transposed` (GPT-2's Conv1D). A: (R, D_in), B: (D_out, R).
    """
    delta = scaling * (B.float() @ A.float())  # (D_out, D_in)
    return (W.float() + (delta.mT if transposed else delta)).to(W.dtype)
