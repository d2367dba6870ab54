"""The base's activations with less kept for the backward pass. Knows tensors; refuses to know models.

    gated: y = W_down (silu(W_gate x) * W_up x)      (Shazeer 2020; Llama, Mistral, Qwen)
    GELU:  y = x Phi(x), Phi the normal distribution (Hendrycks & Gimpel 2016; the exact one, not tanh's)

Autograd keeps gate, up, silu(gate) and the product, each two to four times as wide as x. Here only gate and up are
kept and one kernel gives both gradients; where the three matrices are the frozen base's alone and multiply in matrix
tiles or in 8 bits, only x is kept, and gate and up are computed again: a sixth more products for half the memory.
Otherwise products are most of a step, which would take a sixth longer. Without kernels, or without gradients outside an
engine, the base's own modules compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turret.adapters.batch_context import BatchContext
from turret.adapters.fused import enabled
from turret.adapters.fused.int8 import FrozenProducts, products
from turret.adapters.fused.norms import kept, made
from turret.kernels import Library, usable

SILU = ("SiLU", "SiLUActivation")


class _SwiGLU(torch.autograd.Function):
    """y = silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, library: Library) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.library = library
        return library.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *ctx.library.swiglu_backward(*ctx.saved_tensors, gradients[0].contiguous()), None


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, library: Library) -> Tensor:
        ctx.save_for_backward(x)
        ctx.library = library
        return library.gelu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.library.gelu_backward(*ctx.saved_tensors, gradients[0].contiguous()), None


class _FrozenGatedMLP(torch.autograd.Function):
    """y = W_down (silu(W_gate x) * W_up x) of three frozen matrices.

    dgate, dup = swiglu_backward(gate, up, dy W_down);  dx = dgate W_gate + dup W_up. Kept are gate and up; where tiles
    or 8 bits make them again at little cost, x, and of an x that a norm made what the norm keeps anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, library: Library, by: FrozenProducts
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        both = by.forward(rows, gate), by.forward(rows, up)
        ctx.again, ctx.library, ctx.by = by.cheap or library.tiled(x.dtype), library, by
        if ctx.again:
            own, ctx.norm = kept(x)
            ctx.save_for_backward(gate, up, down, own)
        else:
            ctx.save_for_backward(gate, up, down, *both)
        return by.forward(library.swiglu(*both), down).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gate, up, down, *both = ctx.saved_tensors
        if ctx.again:
            rows = made(both[0], ctx.norm).reshape(-1, gate.shape[1])
            both = [ctx.by.forward(rows, gate), ctx.by.forward(rows, up)]
        dy = ctx.by.backward(gradients[0].reshape(-1, gate.shape[1]), down)
        dx = ctx.by.backward_both(ctx.library.swiglu_backward(*both, dy), (gate, up))
        return dx.view(gradients[0].shape), None, None, None, None, None


class FrozenGated(nn.Module):
    """In place of a gated MLP of the base, with the very same layers under the very same names."""

    def __init__(self, replaced: Any, context: BatchContext) -> None:
        super().__init__()
        self.context = context
        self.gate_proj: nn.Module = replaced.gate_proj
        self.up_proj: nn.Module = replaced.up_proj
        self.down_proj: nn.Module = replaced.down_proj
        self.act_fn: nn.Module = replaced.act_fn

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        library = _kernels("gated_mlp", x)
        if library is not None and all(_frozen(layer, x.dtype) for layer in layers):
            weights: Any = [layer.weight for layer in layers]
            by = products(self.context, x, weights[0])  # the others have the same two sizes
            whole: Tensor = _FrozenGatedMLP.apply(x, *weights, library, by)  # type: ignore[no-untyped-call]
            return whole
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.context.serves and (library := usable(gate, up)) is not None:
            product = library.swiglu(gate.contiguous(), up.contiguous())
        else:
            library = _kernels("gated_mlp", gate, up)
            product = self.act_fn(gate) * up if library is None else _swiglu(gate, up, library)
        output: Tensor = self.down_proj(product)
        return output


class FrozenGELU(nn.Module):
    """In place of the base's exact GELU."""

    def __init__(self, replaced: nn.Module, context: BatchContext) -> None:
        super().__init__()
        self.replaced, self.context = replaced, context

    def forward(self, x: Tensor) -> Tensor:
        if self.context.serves and (library := usable(x)) is not None:
            return library.gelu(x.contiguous())
        library = _kernels("gelu", x)
        plain = library is None
        output: Tensor = self.replaced(x) if plain else _GELU.apply(x.contiguous(), library)  # type: ignore[no-untyped-call]
        return output


def _swiglu(gate: Tensor, up: Tensor, library: Library) -> Tensor:
    product: Tensor = _SwiGLU.apply(gate.contiguous(), up.contiguous(), library)  # type: ignore[no-untyped-call]
    return product


def _frozen(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer is a matrix of the base and nothing else."""
    if type(layer) is not nn.Linear or list(dict(layer.named_parameters())) != ["weight"]:
        return False
    return layer.weight.dtype == dtype and not layer.weight.requires_grad


def _kernels(path: str, *tensors: Tensor) -> Library | None:
    """The kernels, where there is a gradient to be computed through these."""
    if not torch.is_grad_enabled() or not any(each.requires_grad for each in tensors) or not enabled(path):
        return None
    return usable(*tensors)


def in_place_of(module: nn.Module, gated: tuple[str, ...], context: BatchContext) -> nn.Module | None:
    """What takes this module's place while a model is attached, or None where nothing does.

    gated: class names of MLPs with act_fn, gate_proj, up_proj and down_proj.
    """
    name = type(module).__name__
    if name in gated and type(getattr(module, "act_fn", None)).__name__ in SILU:
        return FrozenGated(module, context)
    exact = name == "GELU" and getattr(module, "approximate", "") == "none"
    if exact or (name == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu):
        return FrozenGELU(module, context)
    return None
