"""The operations of a card in Triton, one program each; `reference` has the formulas. Imported on a card alone.

Sums are in float32; a product's result is rounded to the dtype of the tensors where the reference rounds it. Attention
of whole rows is torch's own FlashAttention, the one that `torch.nn.attention.varlen` calls.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turret.card_kernels.lora_programs import (
    add_lora,
    add_mixed_lora,
    lora_factor_gradients,
    lora_input_gradient,
    precise,
    product,
)

KEYS = 64  # keys that a decoding step reads at a time
SMALL = 1024  # elements of one program of SwiGLU

__all__ = [
    "add_lora",
    "add_mixed_lora",
    "attend_step",
    "attention",
    "attention_backward",
    "lora_factor_gradients",
    "lora_input_gradient",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "swiglu",
    "swiglu_backward",
]


# --- norms, rotary positions, SwiGLU ----------------------------------------------------------------------------------


@triton.jit
def _rms_norm(x, weight, y, eps, D, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    own = tl.load(x + at + column, mask=column < D, other=0.0)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    wide = own.to(tl.float32)
    n = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps))
    tl.store(y + at + column, (w * n.to(own.dtype).to(tl.float32)).to(own.dtype), mask=column < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, D = torch.empty_like(x), x.shape[1]
    _rms_norm[(len(x),)](x, weight, y, eps, D, BLOCK=triton.next_power_of_2(D))
    return y


@triton.jit
def _rms_norm_backward(x, weight, dy, plus, dx, eps, D, HAS_PLUS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    own = tl.load(x + at + column, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    g = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(dy + at + column, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
    n = wide * r
    result = r * (g - n * (tl.sum(g * n, 0) / D))
    if HAS_PLUS:
        result += tl.load(plus + at + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at + column, result.to(own.dtype), mask=inside)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, dy: Tensor, plus: Tensor | None) -> Tensor:
    dx, D = torch.empty_like(x), x.shape[1]
    _rms_norm_backward[(len(x),)](
        x, weight, dy, dy if plus is None else plus, dx, eps, D, HAS_PLUS=plus is not None,
        BLOCK=triton.next_power_of_2(D),
    )  # fmt: skip
    return dx


@triton.jit
def _turn(x, cos, sin, sign, at, row, column, half, D, inside):
    """One head of one token. The two halves of cos and of sin need not be equal."""
    first = tl.load(x + at + column, mask=inside, other=0.0)
    second = tl.load(x + at + half + column, mask=inside, other=0.0).to(tl.float32)
    c1 = tl.load(cos + row * D + column, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + row * D + half + column, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + row * D + column, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + row * D + half + column, mask=inside, other=0.0).to(tl.float32)
    wide = first.to(tl.float32)
    return (wide * c1 - sign * second * s1).to(first.dtype), (second * c2 + sign * wide * s2).to(first.dtype)


@triton.jit
def _rotate(q, k, cos, sin, sign, H, D, q_row, q_head, k_row, k_head, HALF: tl.constexpr):
    row, head, half = tl.program_id(0).to(tl.int64), tl.program_id(1), D // 2
    column = tl.arange(0, HALF)
    inside = column < half
    if head < H:
        at = row * q_row + head * q_head
        first, second = _turn(q, cos, sin, sign, at, row, column, half, D, inside)
        tl.store(q + at + column, first, mask=inside)
        tl.store(q + at + half + column, second, mask=inside)
    else:
        at = row * k_row + (head - H) * k_head
        first, second = _turn(k, cos, sin, sign, at, row, column, half, D, inside)
        tl.store(k + at + column, first, mask=inside)
        tl.store(k + at + half + column, second, mask=inside)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    H, D = q.shape[1:]
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1)
    _rotate[(len(q), H + k.shape[1])](q, k, cos, sin, sign, H, D, *strides, HALF=triton.next_power_of_2(D // 2))


@triton.jit
def _swiglu(gate, up, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(gate + at, mask=at < count, other=0.0)
    g = own.to(tl.float32)
    s = (g * tl.sigmoid(g)).to(own.dtype).to(tl.float32)
    tl.store(y + at, (s * tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)).to(own.dtype), mask=at < count)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    _swiglu[(triton.cdiv(y.numel(), SMALL),)](gate, up, y, y.numel(), BLOCK=SMALL)
    return y


@triton.jit
def _swiglu_backward(gate, up, dy, dgate, dup, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    own = tl.load(gate + at, mask=inside, other=0.0)
    g, u = own.to(tl.float32), tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d, s = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32), tl.sigmoid(g)
    tl.store(dgate + at, (d * u * s * (1.0 + g * (1.0 - s))).to(own.dtype), mask=inside)
    tl.store(dup + at, (d * g * s).to(own.dtype), mask=inside)
    tl.store(y + at, ((g * s).to(own.dtype).to(tl.float32) * u).to(own.dtype), mask=inside)


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dgate, dup, y = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    count = y.numel()
    _swiglu_backward[(triton.cdiv(count, SMALL),)](gate, up, dy, dgate, dup, y, count, BLOCK=SMALL)
    return dgate, dup, y


# --- attention --------------------------------------------------------------------------------------------------------


def _edges(causal: bool, window: int) -> dict[str, int]:
    if not window:
        return {}
    return {"window_size_left": window - 1, "window_size_right": 0 if causal else window - 1}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    most: int,
    most_keys: int,
    causal: bool,
    window: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    y, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, key_starts, most, most_keys, 0.0, causal, False, scale=scaling, **_edges(causal, window)
    )
    return y, log_sum


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sum: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    most: int,
    most_keys: int,
    causal: bool,
    window: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # no dropout
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dy, q, k, v, y, log_sum, starts, key_starts, most, most_keys, 0.0, causal, seed, offset, scale=scaling,
        **_edges(causal, window),
    )  # fmt: skip
    return dq, dk, dv


@triton.jit
def _attend_step(
    q, k, v, cos, sin, keys, values, y, lengths, prefixes, window, scaling, H,
    row_stride, head_stride, token_stride, v_row_stride, v_head_stride, v_token_stride,
    GROUPS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One row and one head of keys, with the G heads of queries that share it, padded to GROUPS for a matrix unit."""
    HALF: tl.constexpr = D // 2
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    kind = q.dtype.element_ty
    column, whole, group = tl.arange(0, HALF), tl.arange(0, D), tl.arange(0, GROUPS)
    c1 = tl.load(cos + row * D + column).to(tl.float32)
    c2 = tl.load(cos + row * D + HALF + column).to(tl.float32)
    s1 = tl.load(sin + row * D + column).to(tl.float32)
    s2 = tl.load(sin + row * D + HALF + column).to(tl.float32)
    newest = tl.load(lengths + row) - 1
    prefix = tl.load(prefixes + row)

    own = k + (row * heads + head) * D
    k1, k2 = tl.load(own + column).to(tl.float32), tl.load(own + HALF + column).to(tl.float32)
    new1, new2 = (k1 * c1 - k2 * s1).to(kind), (k2 * c2 + k1 * s2).to(kind)
    new_value = tl.load(v + (row * heads + head) * D + whole)
    keys += row * row_stride + head * head_stride
    values += row * v_row_stride + head * v_head_stride
    tl.store(keys + newest * token_stride + column, new1)
    tl.store(keys + newest * token_stride + HALF + column, new2)
    tl.store(values + newest * v_token_stride + whole, new_value)

    at = q + (row * H + head * G + group[:, None]) * D
    inside = group[:, None] < G
    q1 = tl.load(at + column[None], mask=inside, other=0.0).to(tl.float32)
    q2 = tl.load(at + HALF + column[None], mask=inside, other=0.0).to(tl.float32)
    first, second = (q1 * c1[None] - q2 * s1[None]).to(kind), (q2 * c2[None] + q1 * s2[None]).to(kind)

    # the new token first, from registers: what was just stored need not be visible to a load yet
    score = tl.sum(first.to(tl.float32) * new1.to(tl.float32)[None], 1)
    score += tl.sum(second.to(tl.float32) * new2.to(tl.float32)[None], 1)
    largest = score * scaling  # (GROUPS,)
    total = tl.full((GROUPS,), 1.0, dtype=tl.float32)
    result = tl.zeros((GROUPS, D), dtype=tl.float32) + new_value.to(tl.float32)[None]
    for start in range(0, newest, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = token < newest
        old = keys + token[None].to(tl.int64) * token_stride + column[:, None]
        old1 = tl.load(old, mask=there[None], other=0.0)
        old2 = tl.load(old + HALF, mask=there[None], other=0.0)
        scores = scaling * (product(first, old1, PRECISE) + product(second, old2, PRECISE))
        seen = there
        if window > 0:
            seen = seen & ((newest - token < window) | (token < prefix))
        scores = tl.where(seen[None], scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 1))
        weight, shrunk = tl.exp(scores - above[:, None]), tl.exp(largest - above)
        old_values = tl.load(
            values + token[:, None].to(tl.int64) * v_token_stride + whole[None], mask=there[:, None], other=0.0
        )
        result = result * shrunk[:, None] + product(weight.to(kind), old_values, PRECISE)
        total, largest = total * shrunk + tl.sum(weight, 1), above
    at = y + (row * H + head * G + group[:, None]) * D + whole[None]
    tl.store(at, (result / total[:, None]).to(kind), mask=inside)


def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    prefixes: Tensor,
    window: int,
    scaling: float,
) -> Tensor:
    (B, H, D), heads, y = q.shape, k.shape[1], torch.empty_like(q)
    _attend_step[(B, heads)](
        q, k, v, cos, sin, keys, values, y, lengths, prefixes, window, scaling, H, *keys.stride()[:3],
        *values.stride()[:3], GROUPS=max(16, triton.next_power_of_2(H // heads)), G=H // heads, D=D, BLOCK=KEYS,
        PRECISE=precise(q),
    )  # fmt: skip
    return y
