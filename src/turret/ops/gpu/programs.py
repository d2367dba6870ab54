"""The operations of a GPU in Triton, one program each; `ops.formulas` has the formulas. Imported on a GPU alone.

Sums are in float32; a product's result is rounded to the dtype of the tensors where the reference rounds it. Attention
of whole rows is torch's own FlashAttention, the one that `torch.nn.attention.varlen` calls.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turret.ops.formulas import FIRST_MIX, OF_SEED, OF_SITE, SECOND_MIX

# --- lora programs ----------------------------------------------------------------------------------------------------
# LoRA on a GPU in Triton: of one adapter that trains, and of rows with different adapters.
#
# One program takes up to three layers with one input. Its factors are read in float32 and multiplied in the dtype of
# the tokens.


ROWS = 16  # tokens of one program: the fewest that a GPU's matrix units take
WIDE = 64  # columns that it reads at a time
NUMBERS = 8192  # of factors that one program of mixed LoRA holds at a time: more would not fit its registers

_OF_SITE, _OF_SEED = tl.constexpr(OF_SITE), tl.constexpr(OF_SEED)
_FIRST_MIX, _SECOND_MIX = tl.constexpr(FIRST_MIX), tl.constexpr(SECOND_MIX)


# --- LoRA of one adapter ----------------------------------------------------------------------------------------------


@triton.jit
def _kept(keys, row, column, tokens, threshold, seed, g):
    """Which elements dropout keeps at the g-th site after a seed's, as `formulas.kept`: row (T, 1), column (1, D)."""
    key = tl.load(keys + row, mask=row < tokens, other=0)
    seed = seed.to(tl.uint32) + ((_OF_SITE * g) & 0xFFFFFFFF)
    word = (key.to(tl.uint32) ^ seed) + (column // 32 * 16 + column % 16).to(tl.uint32)
    word = (word ^ (word >> 16)) * _FIRST_MIX
    word = (word ^ (word >> 15) ^ ((key >> 32).to(tl.uint32) + seed * _OF_SEED)) * _SECOND_MIX
    word = word ^ (word >> 16)
    return tl.where(column // 16 % 2 == 0, word & 0xFFFF, word >> 16) >= threshold


@triton.jit
def product(a, b, PRECISE: tl.constexpr):
    if PRECISE:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _shrink(
    x,
    A,
    row,
    tokens,
    D_in,
    rank,
    keys,
    threshold,
    seed,
    g,
    DROPS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """drop(x) A^T for a block of tokens: (T, R) float32."""
    r = tl.arange(0, R)
    h = tl.zeros((row.shape[0], R), dtype=tl.float32)
    for start in range(0, D_in, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row[:, None] < tokens) & (column[None] < D_in)
        own = tl.load(x + row[:, None].to(tl.int64) * D_in + column[None], mask=inside, other=0.0)
        if DROPS:
            keeps = _kept(keys, row[:, None], column[None], tokens, threshold, seed, g)
            own = tl.where(keeps, own, tl.zeros_like(own))
        a = tl.load(A + r[None] * D_in + column[:, None], mask=(r[None] < rank) & (column[:, None] < D_in), other=0.0)
        h += product(own, a.to(own.dtype), PRECISE)
    return h


@triton.jit
def _expand(
    y,
    h,
    B,
    plus,
    row,
    tokens,
    D_out,
    rank,
    scaling,
    HAS_PLUS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """y <- y + plus + scaling h B^T for a block of tokens."""
    r = tl.arange(0, R)
    for start in range(0, D_out, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row[:, None] < tokens) & (column[None] < D_out)
        b = tl.load(B + column[None] * rank + r[:, None], mask=(r[:, None] < rank) & (column[None] < D_out), other=0.0)
        at = row[:, None].to(tl.int64) * D_out + column[None]
        total = scaling * product(h, b.to(h.dtype), PRECISE)
        if HAS_PLUS:
            total += tl.load(plus + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, total.to(h.dtype), mask=inside)


@triton.jit
def _keep_inner(inner, h, row, tokens, g, rank, G: tl.constexpr, R: tl.constexpr):
    r = tl.arange(0, R)
    at = row[:, None].to(tl.int64) * (G * rank) + g * rank + r[None]
    tl.store(inner + at, h, mask=(row[:, None] < tokens) & (r[None] < rank))


@triton.jit(do_not_specialize=["seed", "threshold"])
def _add_lora(
    x,
    y0,
    y1,
    y2,
    A0,
    A1,
    A2,
    B0,
    B1,
    B2,
    plus,
    inner,
    tokens,
    D_in,
    out0,
    out1,
    out2,
    rank,
    scaling,
    keys,
    threshold,
    seed,
    DROPS: tl.constexpr,
    HAS_PLUS: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    row, g = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1)
    kind = inner.dtype.element_ty
    if g == 0:
        h = _shrink(x, A0, row, tokens, D_in, rank, keys, threshold, seed, 0, DROPS, R, BLOCK, PRECISE).to(kind)
        _keep_inner(inner, h, row, tokens, 0, rank, G, R)
        _expand(y0, h, B0, plus, row, tokens, out0, rank, scaling, HAS_PLUS, R, BLOCK, PRECISE)
    elif g == 1:
        h = _shrink(x, A1, row, tokens, D_in, rank, keys, threshold, seed, 1, DROPS, R, BLOCK, PRECISE).to(kind)
        _keep_inner(inner, h, row, tokens, 1, rank, G, R)
        _expand(y1, h, B1, plus, row, tokens, out1, rank, scaling, HAS_PLUS, R, BLOCK, PRECISE)
    else:
        h = _shrink(x, A2, row, tokens, D_in, rank, keys, threshold, seed, 2, DROPS, R, BLOCK, PRECISE).to(kind)
        _keep_inner(inner, h, row, tokens, 2, rank, G, R)
        _expand(y2, h, B2, plus, row, tokens, out2, rank, scaling, HAS_PLUS, R, BLOCK, PRECISE)


def _three(tensors: list[Tensor]) -> list[Tensor]:
    """One to three tensors as three: a program has a fixed number of arguments."""
    return (tensors + [tensors[0]] * 2)[:3]


def _ranks(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))  # a matrix unit takes no fewer


def precise(x: Tensor) -> bool:
    """Whether products must not be rounded to TF32."""
    return x.dtype == torch.float32


def add_lora(
    y: list[Tensor],
    x: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    plus: Tensor | None,
    scaling: float,
    keys: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    G, rank = len(A), A[0].shape[0]
    inner = x.new_empty(len(x), G * rank)
    _add_lora[(triton.cdiv(len(x), ROWS), G)](
        x,
        *_three(y),
        *_three(A),
        *_three(B),
        x if plus is None else plus,
        inner,
        len(x),
        x.shape[1],
        *(each.shape[1] for each in _three(y)),
        rank,
        scaling,
        x if keys is None else keys,
        threshold,
        seed,
        DROPS=keys is not None,
        HAS_PLUS=plus is not None,
        G=G,
        R=_ranks(rank),
        T=ROWS,
        BLOCK=WIDE,
        PRECISE=precise(x),
    )
    return inner


@triton.jit
def _back(dy, B, row, tokens, D_out, rank, scaling, R: tl.constexpr, BLOCK: tl.constexpr, PRECISE: tl.constexpr):
    """scaling dy B for a block of tokens: (T, R) float32."""
    r = tl.arange(0, R)
    dh = tl.zeros((row.shape[0], R), dtype=tl.float32)
    for start in range(0, D_out, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row[:, None] < tokens) & (column[None] < D_out)
        own = tl.load(dy + row[:, None].to(tl.int64) * D_out + column[None], mask=inside, other=0.0)
        b = tl.load(B + column[:, None] * rank + r[None], mask=(r[None] < rank) & (column[:, None] < D_out), other=0.0)
        dh += product(own, b.to(own.dtype), PRECISE)
    return scaling * dh


@triton.jit
def _through(
    dh,
    A,
    row,
    column,
    tokens,
    D_in,
    rank,
    keys,
    threshold,
    seed,
    g,
    DROPS: tl.constexpr,
    R: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """drop(dh A) for a block of tokens and some columns, float32."""
    r = tl.arange(0, R)
    a = tl.load(A + r[:, None] * D_in + column[None], mask=(r[:, None] < rank) & (column[None] < D_in), other=0.0)
    part = product(dh, a.to(dh.dtype), PRECISE)
    if DROPS:
        keeps = _kept(keys, row[:, None], column[None], tokens, threshold, seed, g)
        part = tl.where(keeps, part, 0.0)
    return part


@triton.jit(do_not_specialize=["seed", "threshold"])
def _lora_input_gradient(
    dx,
    dy0,
    dy1,
    dy2,
    A0,
    A1,
    A2,
    B0,
    B1,
    B2,
    inner,
    tokens,
    D_in,
    out0,
    out1,
    out2,
    rank,
    scaling,
    keys,
    threshold,
    seed,
    DROPS: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    row = tl.program_id(0) * T + tl.arange(0, T)
    kind = inner.dtype.element_ty
    dh0 = _back(dy0, B0, row, tokens, out0, rank, scaling, R, BLOCK, PRECISE).to(kind)
    _keep_inner(inner, dh0, row, tokens, 0, rank, G, R)
    dh1, dh2 = dh0, dh0
    if G > 1:
        dh1 = _back(dy1, B1, row, tokens, out1, rank, scaling, R, BLOCK, PRECISE).to(kind)
        _keep_inner(inner, dh1, row, tokens, 1, rank, G, R)
    if G > 2:
        dh2 = _back(dy2, B2, row, tokens, out2, rank, scaling, R, BLOCK, PRECISE).to(kind)
        _keep_inner(inner, dh2, row, tokens, 2, rank, G, R)
    for start in range(0, D_in, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row[:, None] < tokens) & (column[None] < D_in)
        at = row[:, None].to(tl.int64) * D_in + column[None]
        total = tl.load(dx + at, mask=inside, other=0.0).to(tl.float32)
        total += _through(dh0, A0, row, column, tokens, D_in, rank, keys, threshold, seed, 0, DROPS, R, PRECISE)
        if G > 1:
            total += _through(dh1, A1, row, column, tokens, D_in, rank, keys, threshold, seed, 1, DROPS, R, PRECISE)
        if G > 2:
            total += _through(dh2, A2, row, column, tokens, D_in, rank, keys, threshold, seed, 2, DROPS, R, PRECISE)
        tl.store(dx + at, total.to(kind), mask=inside)


def lora_input_gradient(
    dx: Tensor,
    dy: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    scaling: float,
    keys: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    G, rank = len(A), A[0].shape[0]
    inner = dx.new_empty(len(dx), G * rank)
    _lora_input_gradient[(triton.cdiv(len(dx), ROWS),)](
        dx,
        *_three(dy),
        *_three(A),
        *_three(B),
        inner,
        len(dx),
        dx.shape[1],
        *(each.shape[1] for each in _three(dy)),
        rank,
        scaling,
        dx if keys is None else keys,
        threshold,
        seed,
        DROPS=keys is not None,
        G=G,
        R=_ranks(rank),
        T=ROWS,
        BLOCK=WIDE,
        PRECISE=precise(dx),
    )
    return inner


@triton.jit
def _gradient_of_A(
    dA,
    x,
    dh,
    block,
    g,
    tokens,
    D_in,
    rank,
    keys,
    threshold,
    seed,
    DROPS: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    r, column = tl.arange(0, R), block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((R, BLOCK), dtype=tl.float32)
    for start in range(0, tokens, T):
        row = start + tl.arange(0, T)
        inside = (row[:, None] < tokens) & (column[None] < D_in)
        own = tl.load(x + row[:, None].to(tl.int64) * D_in + column[None], mask=inside, other=0.0)
        if DROPS:
            keeps = _kept(keys, row[:, None], column[None], tokens, threshold, seed, g)
            own = tl.where(keeps, own, tl.zeros_like(own))
        at = row[None].to(tl.int64) * (G * rank) + g * rank + r[:, None]
        d = tl.load(dh + at, mask=(row[None] < tokens) & (r[:, None] < rank), other=0.0)
        total += product(d, own, PRECISE)
    at = dA + r[:, None] * D_in + column[None]
    inside = (r[:, None] < rank) & (column[None] < D_in)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def _gradient_of_B(
    dB,
    dy,
    h,
    block,
    g,
    tokens,
    D_out,
    rank,
    scaling,
    G: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    r, column = tl.arange(0, R), block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, R), dtype=tl.float32)
    for start in range(0, tokens, T):
        row = start + tl.arange(0, T)
        inside = (row[None] < tokens) & (column[:, None] < D_out)
        own = tl.load(dy + row[None].to(tl.int64) * D_out + column[:, None], mask=inside, other=0.0)
        at = row[:, None].to(tl.int64) * (G * rank) + g * rank + r[None]
        inner = tl.load(h + at, mask=(row[:, None] < tokens) & (r[None] < rank), other=0.0)
        total += product(own, inner, PRECISE)
    at = dB + column[:, None] * rank + r[None]
    inside = (r[None] < rank) & (column[:, None] < D_out)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + scaling * total, mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _lora_factor_gradients(
    dA0,
    dA1,
    dA2,
    dB0,
    dB1,
    dB2,
    x,
    h,
    dh,
    dy0,
    dy1,
    dy2,
    tokens,
    D_in,
    out0,
    out1,
    out2,
    rank,
    scaling,
    keys,
    threshold,
    seed,
    DROPS: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
    block, g = tl.program_id(0), tl.program_id(1)
    of_A = tl.cdiv(D_in, BLOCK)
    if g == 0:
        if block < of_A:
            _gradient_of_A(
                dA0, x, dh, block, 0, tokens, D_in, rank, keys, threshold, seed, DROPS, G, R, T, BLOCK, PRECISE
            )
        else:
            _gradient_of_B(dB0, dy0, h, block - of_A, 0, tokens, out0, rank, scaling, G, R, T, BLOCK, PRECISE)
    elif g == 1:
        if block < of_A:
            _gradient_of_A(
                dA1, x, dh, block, 1, tokens, D_in, rank, keys, threshold, seed, DROPS, G, R, T, BLOCK, PRECISE
            )
        else:
            _gradient_of_B(dB1, dy1, h, block - of_A, 1, tokens, out1, rank, scaling, G, R, T, BLOCK, PRECISE)
    else:
        if block < of_A:
            _gradient_of_A(
                dA2, x, dh, block, 2, tokens, D_in, rank, keys, threshold, seed, DROPS, G, R, T, BLOCK, PRECISE
            )
        else:
            _gradient_of_B(dB2, dy2, h, block - of_A, 2, tokens, out2, rank, scaling, G, R, T, BLOCK, PRECISE)


def lora_factor_gradients(
    dA: list[Tensor],
    dB: list[Tensor],
    x: Tensor,
    h: Tensor,
    dh: Tensor,
    dy: list[Tensor],
    scaling: float,
    keys: Tensor | None,
    seed: int,
    threshold: int,
) -> None:
    G, (rank, D_in) = len(dA), dA[0].shape
    blocks = triton.cdiv(D_in, WIDE) + triton.cdiv(max(each.shape[1] for each in dy), WIDE)
    _lora_factor_gradients[(blocks, G)](
        *_three(dA),
        *_three(dB),
        x,
        h,
        dh,
        *_three(dy),
        len(x),
        D_in,
        *(each.shape[1] for each in _three(dy)),
        rank,
        scaling,
        x if keys is None else keys,
        threshold,
        seed,
        DROPS=keys is not None,
        G=G,
        R=_ranks(rank),
        T=2 * ROWS,
        BLOCK=WIDE,
        PRECISE=precise(x),
    )


# --- LoRA of rows with different adapters -----------------------------------------------------------------------------


@triton.jit
def _mixed(
    y,
    x,
    plus,
    adapters,
    addresses,
    ranks,
    layer,
    layers,
    D_in,
    D_out,
    HAS_PLUS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Some outputs of one row. Every program computes x A^T again, which costs less than a second launch."""
    row = tl.program_id(0).to(tl.int64)
    kind = x.dtype.element_ty
    adapter = tl.load(adapters + row)
    known = tl.maximum(adapter, 0)
    at = addresses + (known * layers + layer) * 2
    A, B = tl.load(at), tl.load(at + 1)
    rank = tl.where((adapter < 0) | (A == 0), 0, tl.load(ranks + known))
    A, B = A.to(tl.pointer_type(kind)), B.to(tl.pointer_type(kind))
    r, column = tl.arange(0, R), tl.program_id(1) * PART + tl.arange(0, PART)
    h = tl.zeros((R,), dtype=tl.float32)
    for start in range(0, D_in, BLOCK):
        place = start + tl.arange(0, BLOCK)
        a = tl.load(A + r[:, None] * D_in + place[None], mask=(r[:, None] < rank) & (place[None] < D_in), other=0.0)
        own = tl.load(x + row * D_in + place, mask=place < D_in, other=0.0)
        h += tl.sum(a.to(tl.float32) * own.to(tl.float32)[None], 1)
    h = h.to(kind).to(tl.float32)
    b = tl.load(B + r[:, None] * D_out + column[None], mask=(r[:, None] < rank) & (column[None] < D_out), other=0.0)
    total = tl.sum(h[:, None] * b.to(tl.float32), 0)
    at = row * D_out + column
    if HAS_PLUS:
        total += tl.load(plus + at, mask=column < D_out, other=0.0).to(tl.float32)
    total += tl.load(y + at, mask=column < D_out, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(kind), mask=column < D_out)


@triton.jit
def _add_mixed_lora(
    y0,
    y1,
    y2,
    x,
    plus,
    adapters,
    addresses,
    ranks,
    layer0,
    layer1,
    layer2,
    layers,
    D_in,
    out0,
    out1,
    out2,
    HAS_PLUS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    g = tl.program_id(2)
    if g == 0:
        _mixed(y0, x, plus, adapters, addresses, ranks, layer0, layers, D_in, out0, HAS_PLUS, R, BLOCK, PART)
    elif g == 1:
        _mixed(y1, x, plus, adapters, addresses, ranks, layer1, layers, D_in, out1, HAS_PLUS, R, BLOCK, PART)
    else:
        _mixed(y2, x, plus, adapters, addresses, ranks, layer2, layers, D_in, out2, HAS_PLUS, R, BLOCK, PART)


def add_mixed_lora(
    y: list[Tensor],
    x: Tensor,
    flats: list[Tensor],
    adapters: Tensor,
    places: Tensor,
    addresses: Tensor,
    ranks: Tensor,
    layers: list[int],
    most: int,
    plus: Tensor | None,
) -> None:
    outputs, R = [each.shape[1] for each in y], int(triton.next_power_of_2(most))
    part = max(64, NUMBERS // R)
    _add_mixed_lora[(len(x), triton.cdiv(max(outputs), part), len(y))](
        *_three(y),
        x,
        x if plus is None else plus,
        adapters,
        addresses,
        ranks,
        *(layers + layers[:1] * 2)[:3],
        places.shape[1],
        x.shape[1],
        *(each.shape[1] for each in _three(y)),
        HAS_PLUS=plus is not None,
        R=R,
        BLOCK=max(32, NUMBERS // (4 * R)),
        PART=part,
    )


# --- programs ---------------------------------------------------------------------------------------------------------


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
        x,
        weight,
        dy,
        dy if plus is None else plus,
        dx,
        eps,
        D,
        HAS_PLUS=plus is not None,
        BLOCK=triton.next_power_of_2(D),
    )
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
        dy,
        q,
        k,
        v,
        y,
        log_sum,
        starts,
        key_starts,
        most,
        most_keys,
        0.0,
        causal,
        seed,
        offset,
        scale=scaling,
        **_edges(causal, window),
    )
    return dq, dk, dv


@triton.jit
def _attend_step(
    q,
    k,
    v,
    cos,
    sin,
    keys,
    values,
    y,
    lengths,
    prefixes,
    window,
    scaling,
    H,
    row_stride,
    head_stride,
    token_stride,
    v_row_stride,
    v_head_stride,
    v_token_stride,
    GROUPS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
):
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
        q,
        k,
        v,
        cos,
        sin,
        keys,
        values,
        y,
        lengths,
        prefixes,
        window,
        scaling,
        H,
        *keys.stride()[:3],
        *values.stride()[:3],
        GROUPS=max(16, triton.next_power_of_2(H // heads)),
        G=H // heads,
        D=D,
        BLOCK=KEYS,
        PRECISE=precise(q),
    )
    return y
