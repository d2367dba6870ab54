"""Frozen linear layers with a quantized weight, and the library that computes those in 4 bits.

    W = s * NF4[i],    one scale s for each block of 64 values of W (D_out, D_in), one index i of 4 bits for each value

NF4 are 16 values with equal shares of a normal distribution. The scales are rounded to 8 bits themselves (Dettmers et
al. 2023, "QLoRA"; section 3). bitsandbytes keeps and multiplies such a weight. Anything that would read the weight of a
linear layer asks this module first.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

ORIGINAL = "turret_original"  # an attribute of a layer in 4 bits: a function that reads its weight in the checkpoint
KEPT_IN = "turret_quantization"  # an attribute of a model: how its weights were packed when they were loaded
_FETCHER = "kernels"  # the package through which bitsandbytes would fetch compiled code


class State(Protocol):
    """The state that bitsandbytes keeps with a packed weight."""

    dtype: torch.dtype  # of the weight when it is unpacked
    shape: torch.Size  # (D_out, D_in)
    absmax: Tensor  # the scales, rounded to 8 bits if there is a `state2`
    state2: State | None  # of the scales


# --- the library ------------------------------------------------------------------------------------------------------


def library() -> ModuleType:
    """bitsandbytes, which may fetch nothing when it is imported here. Raises ImportError if it is not installed.

    On a processor with AVX-512 BF16 its import fetches a compiled kernel from the Hub and runs it, if the package
    `kernels` is installed. That package is hidden during the import.
    """
    known = sys.modules.get("bitsandbytes")
    if known is not None:
        return known
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of the kernel that it did not fetch
    with hide_package(_FETCHER):
        return importlib.import_module("bitsandbytes")


def before_peft() -> None:
    """Call it before PEFT is imported, which imports bitsandbytes if that is installed."""
    with suppress(ImportError):
        library()


@contextmanager
def hide_package(name: str) -> Iterator[None]:
    """Let the import of one package fail, as if it were not installed."""
    missing = object()
    before = sys.modules.get(name, missing)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is missing:
            del sys.modules[name]
        else:
            sys.modules[name] = before  # type: ignore[assignment]


# --- what a layer is --------------------------------------------------------------------------------------------------


def state_of(weight: Tensor | None) -> State | None:
    """The state that bitsandbytes keeps with a weight in 4 bits; None for any other weight."""
    return getattr(weight, "quant_state", None)


def in_four_bits(layer: nn.Module) -> bool:
    """Whether bitsandbytes keeps the weight of this layer in 4 bits."""
    return state_of(layer._parameters.get("weight")) is not None


def is_packed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight in fewer bits, by any library: then nobody else may read it."""
    return in_four_bits(layer) or "qweight" in layer._buffers  # GPTQ and AWQ call it so


def any_packed(model: nn.Module) -> bool:
    """Whether a layer of the model is packed."""
    return any(is_packed(each) for each in model.modules())


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that adapters can adapt."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or is_packed(module)


def computes_in(layer: nn.Module, model: nn.Module) -> torch.dtype:
    """The dtype of a linear layer's outputs. model: the one that the layer belongs to."""
    weight = layer._parameters.get("weight")
    if (state := state_of(weight)) is not None:
        return state.dtype
    if weight is not None:
        return weight.dtype
    return next(each.dtype for each in model.parameters() if each.is_floating_point())


def count_weights(model: nn.Module) -> int:
    """How many weights the model has; those in 4 bits count one by one."""
    states = [(each, state_of(each)) for each in model.parameters()]
    return sum(each.numel() if state is None else math.prod(state.shape) for each, state in states)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers, with the scales of weights in 4 bits."""
    states = [state for each in model.parameters() if (state := state_of(each)) is not None]
    scales = [part.absmax.nbytes for state in states for part in (state, state.state2) if part is not None]
    return sum(scales) + sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


# --- its weight -------------------------------------------------------------------------------------------------------


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, (D_out, D_in): unpacked to a new tensor, or the layer's own."""
    weight = layer.get_parameter("weight").detach()
    if in_four_bits(layer):
        return FourBitProducts.of(layer).dense()
    return weight if isinstance(layer, nn.Linear) else weight.mT  # GPT-2's Conv1D keeps (D_in, D_out)


def has_original(layer: nn.Module) -> bool:
    """Whether `original_weight` can read a weight."""
    return hasattr(layer, ORIGINAL)


def original_weight(layer: nn.Module) -> Tensor | None:
    """The checkpoint's weight, (D_out, D_in), of a layer that was loaded in 4 bits; None if the checkpoint has none."""
    read: Callable[[], Tensor] | None = getattr(layer, ORIGINAL, None)
    return None if read is None else read()


class FourBitProducts(NamedTuple):
    """The products of a frozen weight in 4 bits with rows of tokens (N, D). Saves nothing of them.

    weight: the packed bytes. state: what unpacks them.
    """

    weight: Tensor
    state: State

    @classmethod
    def of(cls, layer: nn.Module) -> FourBitProducts:
        parameter = layer.get_parameter("weight")
        state = state_of(parameter)
        assert state is not None
        return cls(parameter.data, state)

    def dense(self) -> Tensor:
        """W, (D_out, D_in)."""
        return library().functional.dequantize_4bit(self.weight, self.state)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b."""
        bias = None if bias is None else bias.to(x.dtype)
        return library().matmul_4bit(x, self.weight, self.state, bias=bias)

    def backward(self, dy: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
        """dy W + plus."""
        dx = dy @ self.dense().to(dy.dtype)
        return dx if plus is None else plus.add_(dx)


def compute_in(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Let every layer in 4 bits multiply in this dtype, and never rewrite its weight. None: the checkpoint's dtype.

    Without this, bitsandbytes rearranges a weight for a kernel of processors with AVX-512 BF16 the first time that the
    layer is called without gradients. The rearranged weight gives no gradient any more.
    """
    for layer in model.modules():
        state = state_of(layer._parameters.get("weight"))
        if state is not None:
            state.dtype = dtype or state.dtype
            vars(layer).update(compute_dtype=state.dtype, compute_type_is_set=True, support_avx512bf16_for_cpu=False)
