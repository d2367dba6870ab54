"""Rotary positions, SwiGLU and the masks of dropout in plain torch, on any device.

Where a module of transformers rounds to the dtype of its tensors, these do too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WORD = 0xFFFFFFFF
OF_SITE, OF_SEED, OF_HEAD = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D  # odd numbers, so that all bits of each count
FIRST_MIX, SECOND_MIX = 0x7FEB352D, 0x846CA68B


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """x <- x cos + sign rotate_half(x) sin, in place. q: (N, H, D), k: (N, H_kv, D), cos and sin: (N, D)."""
    for x in (q, k):
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        x.copy_(x.float() * cos.float()[:, None] + sign * turned * sin.float()[:, None])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up. All (N, F)."""
    return F.silu(gate) * up


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup). All (N, F)."""
    g, u, d = gate.float(), up.float(), dy.float()
    s = torch.sigmoid(g)
    dgate, dup = d * u * s * (1.0 + g * (1.0 - s)), d * g * s
    return dgate.to(gate.dtype), dup.to(gate.dtype)


def kept(keys: Tensor, seed: int, threshold: int, width: int, heads: int = 0) -> Tensor:
    """Which elements dropout keeps: those whose hash of 16 bits reaches the threshold. The same as the kernels' mask.

        x = ((key mod 2^32) xor seed) + OF_HEAD head + word,    y = key / 2^32 + OF_SEED seed,    all modulo 2^32
        x <- FIRST_MIX (x xor x / 2^16);    x <- SECOND_MIX (x xor x / 2^15 xor y);    x <- x xor x / 2^16

    Word 16 i + j decides the columns 32 i + j, by its low half, and 32 i + j + 16.

    Args:
        keys: (..., T) int64.
        seed: of the site, below 2^32.
        threshold: p 2^16.
        width: D, the columns.
        heads: H of attention; 0 for none.

    Returns:
        (..., T, D) bool, or (..., H, T, D).
    """
    blocks, device = -(-width // 32), keys.device
    x = (keys ^ seed).to(torch.int32)  # the low half; products and sums of int32 wrap around
    y = (keys >> 32).to(torch.int32) + _int32(seed * OF_SEED)
    if heads:
        x = x[..., None, :] + (torch.arange(heads, device=device) * OF_HEAD).to(torch.int32)[:, None]
        y = y[..., None, :]
    x = x[..., None] + torch.arange(16 * blocks, dtype=torch.int32, device=device)
    x.bitwise_xor_(_behind(x, 16)).mul_(_int32(FIRST_MIX))
    x.bitwise_xor_(_behind(x, 15).bitwise_xor_(y[..., None])).mul_(_int32(SECOND_MIX))
    high = _behind(x, 16)
    halves = torch.empty(*x.shape[:-1], blocks, 2, 16, dtype=torch.bool, device=device)
    words = (*x.shape[:-1], blocks, 16)
    torch.ge(x.bitwise_xor_(high).bitwise_and_(WORD >> 16).view(words), threshold, out=halves[..., 0, :])
    torch.ge(high.view(words), threshold, out=halves[..., 1, :])
    return halves.flatten(-3)[..., :width]


def _int32(word: int) -> int:
    """32 bits as a number of int32."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


def _behind(x: Tensor, bits: int) -> Tensor:
    """x / 2^bits of 32 bits without a sign."""
    return (x >> bits).bitwise_and_(WORD >> bits)
