"""What this processor computes natively, asked of torch. Changes none of torch's settings."""

from __future__ import annotations

from functools import cache

import torch


@cache
def native_bfloat16() -> bool:
    """Whether bfloat16 is computed by the hardware, and not emulated several times slower than float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))
