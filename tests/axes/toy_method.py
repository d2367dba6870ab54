"""A toy method in one file: one trained number for each output of a layer.

    y = W x + s * (B A x),    s: (D_out,) trained from zero;  A: (2, D_in) and B: (D_out, 2) drawn from a seed

Only s is stored. A batch of many adapters computes it by the low-rank factors A and diag(s) B. PEFT has no such method.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from turret.adapters.adapter import LORA_PREFIX, Adapter, Parts
from turret.adapters.hooks import AdapterInit, HookedModel, device_of, linear_at, routed_linear, target_paths
from turret.adapters.lora import LoRAFactors, layer_sizes
from turret.adapters.tuners.tuner import Tuner, mount_head
from turret.errors import AdapterError
from turret.methods import Method
from turret.transformer import Model

RANK = 2
SUFFIX = ".scale"


class Scale(Method):
    """The settings, and what differs from the protocol's defaults."""

    tuner_at: ClassVar[str] = f"{__name__}:ScaleTuner"
    kind: Literal["scale"] = "scale"
    seed: int = Field(default=7, ge=0)  # of A and B

    @property
    def summary(self) -> str:
        return "a scale for every output of the query and value layers"

    def rate(self, family_kind: str, large: bool) -> float:
        return 5e-3


class Scaled(nn.Module):
    """B = s * B0, for s: (D_out, 1)."""

    def __init__(self, B0: Tensor) -> None:
        super().__init__()
        self.register_buffer("B0", B0)

    def forward(self, scale: Tensor) -> Tensor:
        return scale * self.B0

    def right_inverse(self, B: Tensor) -> Tensor:
        return B[:, :1] / self.B0[:, :1]


class ScaleTuner(Tuner[Scale]):
    def start(self, model: Model, attached: HookedModel, beginning: AdapterInit) -> None:
        super().start(model, attached, beginning)
        for path in target_paths(model, None):
            self._put(model, attached, path, slot=1)

    def tensors(self, attached: HookedModel, slot: int) -> dict[str, Tensor]:
        factors = {path: layer.factors(slot) for path, layer in attached.linears.items()}
        return {f"{LORA_PREFIX}{path}{SUFFIX}": scale_of(each) for path, each in factors.items() if each is not None}

    def parts(self, model: Model, adapter: Adapter) -> Parts:
        factors = {}
        for name, scale in adapter.tensors.items():
            path = name.removeprefix(LORA_PREFIX).removesuffix(SUFFIX)
            A, B0 = self._drawn(linear_at(model, path))
            if scale.shape != (len(B0), 1):
                raise AdapterError(f"{name} has shape {tuple(scale.shape)}: expected ({len(B0)}, 1); another base's")
            factors[path] = (A, scale.float() * B0)
        return Parts(factors)

    def mount(self, model: Model, attached: HookedModel, adapter: Adapter, slot: int) -> None:
        for path in self.parts(model, adapter).factors:
            factors = self._put(model, attached, path, slot)
            scale_of(factors).copy_(adapter.tensors[f"{LORA_PREFIX}{path}{SUFFIX}"])
            factors.requires_grad_(False).eval()
        mount_head(model, attached, adapter.head, slot)

    def owns(self, name: str) -> bool:
        return name.endswith(SUFFIX)

    def _drawn(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        generator, (d_in, d_out) = torch.Generator().manual_seed(self.method.seed), layer_sizes(layer)
        return torch.randn(RANK, d_in, generator=generator), torch.randn(d_out, RANK, generator=generator)

    def _put(self, model: Model, attached: HookedModel, path: str, slot: int) -> LoRAFactors:
        A, B0 = self._drawn(linear_at(model, path))
        factors = LoRAFactors(A, torch.zeros_like(B0), 1.0)
        factors.lora_A.requires_grad_(False)
        parametrize.register_parametrization(factors, "lora_B", Scaled(B0))
        routed_linear(model, attached, path).slots[str(slot)] = factors.to(device_of(model))
        return factors


def scale_of(factors: Any) -> Tensor:
    """The trained numbers s: (D_out, 1)."""
    return factors.parametrizations.lora_B.original.detach()
