"""Whether a device computes bfloat16 natively, and which library multiplies float32 fastest without rounding."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
TRUE_FLOAT32 = 2e-6  # relative error against float64; a product of factors rounded to bfloat16 has 2e-3
QUICKER = 1.3  # the speedup from which oneDNN is used: far from 1.0 (Zen 4) and 2.0 (Zen 5), so noise does not decide
_ONEDNN: Any = torch.backends.mkldnn  # torch has no types for it
SHAPES = ((16, 384, 384), (37, 384, 30), (130, 96, 70), (224, 1536, 384), (512, 64, 2048))  # T, D_in, D_out


@cache
def native_bfloat16(device: torch.device = CPU) -> bool:
    """Whether a device computes bfloat16 natively. Emulation is several times slower than float32."""
    if device.type == "cuda":  # NVIDIA's GPUs since Ampere, which has compute capability 8.0; all that ROCm supports
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


@dataclass(frozen=True)
class Float32Products:
    """A measurement of oneDNN's float32 products on this processor."""

    error: float  # largest relative error of oneDNN against float64; NaN if this torch has no oneDNN
    faster: float | None  # speedup of oneDNN over the default; None if it was not measured

    @property
    def take_onednn(self) -> bool:
        """Whether oneDNN does not round and is clearly faster."""
        return self.faster is not None and self.faster >= QUICKER

    def __str__(self) -> str:
        if math.isnan(self.error):
            return "torch's default; this torch has no oneDNN"
        if self.error > TRUE_FLOAT32:
            return f"torch's default; oneDNN rounds here (error {self.error:.0e})"
        if not self.take_onednn:
            return "torch's default; oneDNN is no faster here"
        return f"oneDNN, {self.faster:.1f}x faster than torch's default (error {self.error:.0e})"


@cache
def float32_products() -> Float32Products:
    """Compare oneDNN's float32 products with torch's default. torch's settings do not change.

    torch computes float32 products by MKL, which is slow on some processors (Zen 5). `fp32_precision = "bf16"` selects
    oneDNN and allows it to round. On a processor for which oneDNN has no rounding kernel, it computes in full float32.
    So the error is measured first, and the speed only if there is no rounding.
    """
    if not _ONEDNN.is_available():
        return Float32Products(float("nan"), None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        error = max(_errors())
        return Float32Products(error, _speed() if error <= TRUE_FLOAT32 else None)


def use_quick_float32() -> None:
    """Select oneDNN for the float32 products of this process if it does not round and is faster.

    This changes a setting of torch, unless the program has set it already.
    """
    if _ONEDNN.matmul.fp32_precision == "none" and float32_products().take_onednn:
        _ONEDNN.matmul.fp32_precision = "bf16"


@contextmanager
def _by_onednn() -> Iterator[None]:
    precision = _ONEDNN.matmul.fp32_precision
    _ONEDNN.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        _ONEDNN.matmul.fp32_precision = precision


def _errors() -> Iterator[float]:
    """The relative errors of the products in a forward and a backward pass, and of batched products."""
    for tokens, d_in, d_out in SHAPES:
        x, weight = torch.randn(tokens, d_in), torch.randn(d_out, d_in)
        y = torch.randn(tokens, d_out)
        heads = torch.randn(4, tokens, 64)
        for left, right in ((x, weight.t()), (y, weight), (y.t(), x), (heads, heads.transpose(1, 2))):
            yield relative_error(left, right)


def relative_error(left: Tensor, right: Tensor) -> float:
    """|L R - exact| / |exact| in Frobenius norms, where oneDNN computes L R and exact is the float64 product."""
    exact = left.double() @ right.double()
    with _by_onednn():
        product = left @ right
    return float((product.double() - exact).norm() / exact.norm())


def _speed() -> float:
    """The speedup of oneDNN over the default, by the shortest times of products that run in turns."""
    x, weight = torch.randn(512, 384), torch.randn(1536, 384)

    def seconds() -> float:
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        return time.perf_counter() - began

    default, onednn = [], []
    for _ in range(8):
        default.append(seconds())
        with _by_onednn():
            onednn.append(seconds())
    return min(default) / min(onednn)
