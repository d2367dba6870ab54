"""GELU and gated MLPs of the base, with less saved for the backward pass.

    gated: y = W_down (silu(W_gate x) * W_up x)      (Shazeer 2020; Llama, Mistral, Qwen)
    GELU:  y = x Phi(x), Phi the normal distribution (Hendrycks & Gimpel 2016; the exact one, not tanh's)

Autograd saves gate, up, silu(gate) and the product, each two to four times as wide as x. Here only gate and up are
saved, and one kernel gives both gradients. If the three matrices are frozen and products are cheap (matrix tiles or 8
bits), only x is saved and gate and up are computed again: a sixth more products for half the memory. Without kernels,
and without gradients outside an engine, the base's own modules compute.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from turret.adapters.autograd import FunctionContext, Gradients, KernelContext, apply
from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.int8 import FrozenProducts, products
from turret.adapters.fused.residual import RecomputedNorm, restored, to_save
from turret.ops import gpu as gpu_kernels
from turret.ops.cpu import Library, usable

SILU = ("SiLU", "SiLUActivation")


class _SwiGLU(torch.autograd.Function):
    """y = silu(gate) * up."""

    @staticmethod
    def forward(ctx: KernelContext, gate: Tensor, up: Tensor, library: Library) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.library = library
        return library.swiglu(gate, up)

    @staticmethod
    def backward(ctx: KernelContext, *gradients: Tensor) -> Gradients:
        gate, up = ctx.saved_tensors
        return *ctx.library.swiglu_backward(gate, up, gradients[0].contiguous()), None


class _CardSwiGLU(torch.autograd.Function):
    """The same on a GPU, in one launch each way."""

    @staticmethod
    def forward(ctx: FunctionContext, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y: Tensor = torch.ops.turret.swiglu(gate, up)
        return y

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        dgate, dup, _ = torch.ops.turret.swiglu_backward(*ctx.saved_tensors, gradients[0].contiguous())
        return dgate, dup


class _GELU(torch.autograd.Function):
    """y = x Phi(x)."""

    @staticmethod
    def forward(ctx: KernelContext, x: Tensor, library: Library) -> Tensor:
        ctx.save_for_backward(x)
        ctx.library = library
        return library.gelu(x)

    @staticmethod
    def backward(ctx: KernelContext, *gradients: Tensor) -> Gradients:
        return ctx.library.gelu_backward(ctx.saved_tensors[0], gradients[0].contiguous()), None


class _MLPContext(KernelContext, Protocol):
    products: FrozenProducts
    recomputes: bool
    norm: RecomputedNorm | None


class _FrozenGatedMLP(torch.autograd.Function):
    """y = W_down (silu(W_gate x) * W_up x) of three frozen matrices.

    dgate, dup = swiglu_backward(gate, up, dy W_down);  dx = dgate W_gate + dup W_up. gate and up are saved. If products
    are cheap, x is saved instead, or the input of the norm that computed x.
    """

    @staticmethod
    def forward(
        ctx: _MLPContext, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, library: Library, by: FrozenProducts
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        both = by.forward(rows, gate), by.forward(rows, up)
        ctx.recomputes, ctx.library, ctx.products = by.cheap or library.tiled(x.dtype), library, by
        if ctx.recomputes:
            own, ctx.norm = to_save(x)
            ctx.save_for_backward(gate, up, down, own)
        else:
            ctx.save_for_backward(gate, up, down, *both)
        return by.forward(library.swiglu(*both), down).view(x.shape)

    @staticmethod
    def backward(ctx: _MLPContext, *gradients: Tensor) -> Gradients:
        gate, up, down, *saved = ctx.saved_tensors
        by = ctx.products
        if ctx.recomputes:
            rows = restored(saved[0], ctx.norm).reshape(-1, gate.shape[1])
            saved = [by.forward(rows, gate), by.forward(rows, up)]
        dy = by.backward(gradients[0].reshape(-1, gate.shape[1]), down)
        dx = by.backward_both(ctx.library.swiglu_backward(saved[0], saved[1], dy), (gate, up))
        return dx.view(gradients[0].shape), None, None, None, None, None


class FrozenGated(nn.Module):
    """Replaces a gated MLP of the base; the base's own layers stay inside under the same names."""

    def __init__(self, replaced: nn.Module, context: BatchContext) -> None:
        super().__init__()
        self.context = context
        self.gate_proj = replaced.get_submodule("gate_proj")
        self.up_proj = replaced.get_submodule("up_proj")
        self.down_proj = replaced.get_submodule("down_proj")
        self.act_fn = replaced.get_submodule("act_fn")

    def forward(self, x: Tensor) -> Tensor:
        if (library := _kernels("gated_mlp", x)) is not None and (weights := self._frozen_weights(x.dtype)) is not None:
            by = products(self.context, x, weights[0])  # the others have the same two sizes
            return apply(_FrozenGatedMLP, x, *weights, library, by)
        gate, up = self.gate_proj(x), self.up_proj(x)
        product: Tensor
        if self.context.serves and (library := usable(gate, up)) is not None:
            product = library.swiglu(gate.contiguous(), up.contiguous())
        elif (library := _kernels("gated_mlp", gate, up)) is not None:
            product = apply(_SwiGLU, gate.contiguous(), up.contiguous(), library)
        elif gpu_kernels.usable(gate, up):
            product = apply(_CardSwiGLU, gate.contiguous(), up.contiguous())
        else:
            product = self.act_fn(gate) * up
        output: Tensor = self.down_proj(product)
        return output

    def _frozen_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        """The weights of gate, up and down, if each layer is one frozen matrix and nothing else."""
        gate, up, down = (_frozen_weight(each, dtype) for each in (self.gate_proj, self.up_proj, self.down_proj))
        return None if gate is None or up is None or down is None else (gate, up, down)


class FrozenGELU(nn.Module):
    """Replaces the base's exact GELU."""

    def __init__(self, replaced: nn.Module, context: BatchContext) -> None:
        super().__init__()
        self.replaced, self.context = replaced, context

    def forward(self, x: Tensor) -> Tensor:
        if self.context.serves and (library := usable(x)) is not None:
            return library.gelu(x.contiguous())
        if (library := _kernels("gelu", x)) is not None:
            return apply(_GELU, x.contiguous(), library)
        output: Tensor = self.replaced(x)
        return output


def _frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The weight of a layer that is one frozen matrix and nothing else."""
    if type(layer) is not nn.Linear or list(dict(layer.named_parameters())) != ["weight"]:
        return None
    return layer.weight if layer.weight.dtype == dtype and not layer.weight.requires_grad else None


def _kernels(path: str, *tensors: Tensor) -> Library | None:
    """The kernels, if the path is enabled and a gradient passes through these tensors."""
    if not torch.is_grad_enabled() or not any(each.requires_grad for each in tensors) or not enabled(path):
        return None
    return usable(*tensors)


def replacement(module: nn.Module, gated: tuple[str, ...], context: BatchContext) -> nn.Module | None:
    """The module that replaces this one while a model is attached, or None.

    gated: class names of MLPs with act_fn, gate_proj, up_proj and down_proj.
    """
    name = type(module).__name__
    if name in gated and type(getattr(module, "act_fn", None)).__name__ in SILU:
        return FrozenGated(module, context)
    exact = name == "GELU" and getattr(module, "approximate", "") == "none"
    if exact or (name == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu):
        return FrozenGELU(module, context)
    return None
