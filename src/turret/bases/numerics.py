"""What this processor computes quickly and exactly, asked and measured. Leaves torch's settings as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter
from typing import Any

import torch

EXACT = 2e-6  # relative error of a float32 product that was truly computed in float32
_GAIN = 1.25  # a product must be this much quicker before the default is left
_mkldnn: Any = torch.backends.mkldnn


@cache
def native_bfloat16() -> bool:
    """Whether bfloat16 is computed by the hardware, and not emulated several times slower than float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


@contextmanager
def quickest_exact_matmul() -> Iterator[str]:
    """Within it, float32 products go to oneDNN where that is quicker here and just as exact; yields the setting."""
    chosen = _quickest_exact()
    with _precision(chosen):
        yield chosen


@cache
def _quickest_exact() -> str:
    """The setting of `mkldnn.matmul.fp32_precision` to use; "bf16" lets oneDNN have the product, and it may round."""
    rounds = [(product("none"), product("bf16")) for _ in range(5)]  # interleaved: a neighbour slows both alike
    plain, other = zip(*rounds, strict=True)
    quicker = _GAIN * min(seconds for _, seconds in other) < min(seconds for _, seconds in plain)
    return "bf16" if quicker and max(error for error, _ in other) <= EXACT else "none"


def product(precision: str, n: int = 512) -> tuple[float, float]:
    """(relative error against float64, seconds) of a float32 product (n, n) under a setting."""
    x, y = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0))
    with _precision(precision):
        x @ y
        start = perf_counter()
        got = x @ y
        seconds = perf_counter() - start
    exact = x.double() @ y.double()
    return float((got.double() - exact).norm() / exact.norm()), seconds


@contextmanager
def _precision(value: str) -> Iterator[None]:
    matmul = _mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = value
    try:
        yield
    finally:
        matmul.fp32_precision = before
