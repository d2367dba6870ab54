"""The one Triton program of Turret: dropout by a hash. Imported on a GPU alone.

What it buys: no library has a mask that depends on the example and not on the pass. In torch's own operations the mask
(`structs.dropout_mask`) is 14 launches and moves 40 bytes an element; here it is one launch and moves 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turret.ops.structs import FIRST_MIX, OF_SEED, SECOND_MIX

WIDE = 1024  # columns of one program
_OF_SEED, _FIRST_MIX, _SECOND_MIX = tl.constexpr(OF_SEED), tl.constexpr(FIRST_MIX), tl.constexpr(SECOND_MIX)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _dropout(x, y, keys, D, seed, threshold, scale, BLOCK: tl.constexpr):
    """Which elements are kept is as in `structs.dropout_mask`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key, seed = tl.load(keys + row), seed.to(tl.uint32)
    word = (key.to(tl.uint32) ^ seed) + (column // 32 * 16 + column % 16).to(tl.uint32)
    word = (word ^ (word >> 16)) * _FIRST_MIX
    word = (word ^ (word >> 15) ^ ((key >> 32).to(tl.uint32) + seed * _OF_SEED)) * _SECOND_MIX
    word = word ^ (word >> 16)
    keeps = tl.where(column // 16 % 2 == 0, word & 0xFFFF, word >> 16) >= threshold
    own = tl.load(x + row * D + column, mask=column < D, other=0.0)
    kept = tl.where(keeps, own.to(tl.float32) * scale, 0.0)
    tl.store(y + row * D + column, kept.to(own.dtype), mask=column < D)


def dropout(x: Tensor, keys: Tensor, seed: int, threshold: int, scale: float) -> Tensor:
    """The elements of x (N, D) that the mask keeps times `scale`, zero elsewhere. keys: (N,) int64."""
    y, (rows, D) = torch.empty_like(x), x.shape
    signed = (seed ^ 1 << 31) - (1 << 31)  # 32 bits as Triton takes a number
    with torch.cuda.device_of(x):
        _dropout[(rows, triton.cdiv(D, WIDE))](x, y, keys, D, signed, threshold, scale, BLOCK=WIDE)
    return y
