"""What is asked of the processor is answered, and changes no setting."""

from __future__ import annotations

import torch

from turret import bases


def test_bfloat16_is_native_exactly_where_torch_says_so_of_this_processor() -> None:
    if torch.cuda.is_available():
        expected = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.cpu.get_capabilities().get("architecture") == "x86_64":
        expected = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        expected = bases.native_bfloat16()
    assert bases.native_bfloat16() == expected
