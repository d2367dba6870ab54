"""The MLPs of the base: which one a module is, and a gated one on a GPU.

gated: y = W_down (silu(W_gate x) * W_up x)      (Shazeer 2020; Llama, Mistral, Qwen)
GELU:  y = x Phi(x), Phi the normal distribution (Hendrycks & Gimpel 2016; the exact one, not tanh's)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turret import gpu_kernels
from turret.adapters.autograd import FunctionContext, Gradients, apply

SILU = ("SiLU", "SiLUActivation")


class _GpuSwiGLU(torch.autograd.Function):
    """y = silu(gate) * up on a GPU, in one launch each way."""

    @staticmethod
    def forward(ctx: FunctionContext, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y: Tensor = torch.ops.turret.swiglu(gate, up)
        return y

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        dgate, dup, _ = torch.ops.turret.swiglu_backward(*ctx.saved_tensors, gradients[0].contiguous())
        return dgate, dup


class FrozenGated(nn.Module):
    """Replaces a gated MLP of the base; the base's own layers stay inside under the same names."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.gate_proj = replaced.get_submodule("gate_proj")
        self.up_proj = replaced.get_submodule("up_proj")
        self.down_proj = replaced.get_submodule("down_proj")
        self.act_fn = replaced.get_submodule("act_fn")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product: Tensor
        if gpu_kernels.usable(gate, up):
            product = apply(_GpuSwiGLU, gate.contiguous(), up.contiguous())
        else:
            product = self.act_fn(gate) * up
        output: Tensor = self.down_proj(product)
        return output


def is_exact_gelu(module: nn.Module) -> bool:
    """Whether the module is y = x Phi(x), Phi the normal distribution, and not the approximation with tanh."""
    name = type(module).__name__
    exact = name == "GELU" and getattr(module, "approximate", "") == "none"
    return exact or (name == "GELUActivation" and getattr(module, "act", None) is nn.functional.gelu)


def is_gated(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the module is a gated MLP with SiLU. names: of classes with act_fn, gate_proj, up_proj and down_proj."""
    return type(module).__name__ in names and type(getattr(module, "act_fn", None)).__name__ in SILU
