"""What this processor computes natively, and which library multiplies float32 fastest here without rounding."""

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

TRUE_FLOAT32 = 2e-6  # relative error against float64; a product of factors rounded to bfloat16 has 2e-3
QUICKER = 1.3  # how much faster oneDNN must be: far from 1.0 (Zen 4) and from 2.0 (Zen 5), so noise decides nothing
_ONEDNN: Any = torch.backends.mkldnn  # torch ships no types for it
SHAPES = ((16, 384, 384), (37, 384, 30), (130, 96, 70), (224, 1536, 384), (512, 64, 2048))  # T, D_in, D_out


@cache
def native_bfloat16() -> bool:
    """Whether bfloat16 is computed by the hardware, and not emulated several times slower than float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


@dataclass(frozen=True)
class Float32Products:
    """What was found about oneDNN's float32 products on this processor."""

    error: float  # the largest relative error of oneDNN's products against float64; NaN where there is no oneDNN
    faster: float | None  # oneDNN's speed over the default's; None where it was not measured

    @property
    def take_onednn(self) -> bool:
        """Whether oneDNN computes true float32 and is clearly faster."""
        return self.faster is not None and self.faster >= QUICKER

    def __str__(self) -> str:
        if math.isnan(self.error):
            return "torch's default; this torch has no oneDNN"
        if self.error > TRUE_FLOAT32:
            return f"torch's default; oneDNN would round (error {self.error:.0e})"
        if not self.take_onednn:
            return "torch's default; oneDNN is no faster here"
        return f"oneDNN, {self.faster:.1f}x faster than torch's default (error {self.error:.0e})"


@cache
def float32_products() -> Float32Products:
    """Compare oneDNN's float32 products with torch's default ones; torch's settings stay as they were.

    torch hands float32 products to MKL, which is slow on some processors (Zen 5). `fp32_precision = "bf16"` hands
    them to oneDNN and allows it to round. Where oneDNN has no rounding kernel for a processor, it computes in float32
    all the same. So the numbers are checked first, and time is measured only where they are true float32.
    """
    if not _ONEDNN.is_available():
        return Float32Products(float("nan"), None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        error = max(_errors())
        return Float32Products(error, _speed() if error <= TRUE_FLOAT32 else None)


def use_quick_float32() -> None:
    """Have this process multiply float32 by oneDNN where that is true float32 and faster.

    The setting is torch's own and holds for the whole process. One that the program has made already is left alone.
    """
    if _ONEDNN.matmul.fp32_precision == "none" and float32_products().take_onednn:
        _ONEDNN.matmul.fp32_precision = "bf16"


@contextmanager
def _by_onednn() -> Iterator[None]:
    before = _ONEDNN.matmul.fp32_precision
    _ONEDNN.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        _ONEDNN.matmul.fp32_precision = before


def _errors() -> Iterator[float]:
    """The relative error of forward products, products with a transposed factor, and batched products."""
    for tokens, d_in, d_out in SHAPES:
        x, weight = torch.randn(tokens, d_in), torch.randn(d_out, d_in)
        y = torch.randn(tokens, d_out)
        heads = torch.randn(4, tokens, 64)
        for left, right in ((x, weight.t()), (y, weight), (y.t(), x), (heads, heads.transpose(1, 2))):
            yield relative_error(left, right)


def relative_error(left: Tensor, right: Tensor) -> float:
    """|L R - exact| / |exact| by oneDNN, in Frobenius norms; exact is the product in float64."""
    exact = left.double() @ right.double()
    with _by_onednn():
        found = left @ right
    return float((found.double() - exact).norm() / exact.norm())


def _speed() -> float:
    """oneDNN's speed over the default's: the shortest of several products each, in turns."""
    x, weight = torch.randn(512, 384), torch.randn(1536, 384)

    def seconds() -> float:
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        return time.perf_counter() - began

    default, other = [], []
    for _ in range(8):
        default.append(seconds())
        with _by_onednn():
            other.append(seconds())
    return min(default) / min(other)
