"""Check on one layer, before a training, whether a method of PEFT can compute on a quantized base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from turret import quantized
from turret.errors import AdapterError

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

REMEDY = "use lora, prefix or head, or base_quantization none"


def require_computable(layers: Sequence[BaseTunerLayer], kind: str) -> None:
    """Raise AdapterError for a method that reads a quantized weight as if it were plain.

    PEFT's first layer with a packed weight computes two tokens and their gradient. All layers of a method are of one
    kind.
    """
    for layer in layers:
        base = layer.get_base_layer()
        if not quantized.packed(base):
            continue
        weight = next(iter((*base.parameters(), *base.buffers())))
        dtype = quantized.computes_in(base, base)
        x = torch.ones(1, 2, base.in_features, dtype=dtype, device=weight.device, requires_grad=True)
        try:
            with torch.enable_grad():
                y = layer(x)
            torch.autograd.grad(y.float().sum(), x)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise AdapterError(f"PEFT's {kind} cannot compute on a quantized base ({reason}): {REMEDY}") from None
        if not bool(torch.isfinite(y).all()):
            raise AdapterError(f"PEFT's {kind} gives no finite numbers on a quantized base: {REMEDY}")
        return
