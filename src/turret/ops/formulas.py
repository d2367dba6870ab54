"""Every operation of a GPU in plain torch: what its Triton program must compute, on any device.

Sums are in float32. Where a module of transformers rounds to the dtype of its tensors, these do too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

WORD = 0xFFFFFFFF
OF_SITE, OF_SEED, OF_HEAD = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D  # odd numbers, so that all bits of each count
FIRST_MIX, SECOND_MIX = 0x7FEB352D, 0x846CA68B


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = w n,  n = x / sqrt(mean(x^2) + eps). x: (N, D), weight: (D,) -> (N, D)."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm_backward(x: Tensor, weight: Tensor, eps: float, dy: Tensor, plus: Tensor | None) -> Tensor:
    """dx = r (g - n mean(g n)) + plus,  g = w dy,  r = 1 / sqrt(mean(x^2) + eps). All (N, D)."""
    wide = x.float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    n, g = wide * r, dy.float() * weight.float()
    dx = r * (g - n * (g * n).mean(-1, keepdim=True))
    return (dx if plus is None else dx + plus.float()).to(x.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """x <- x cos + sign rotate_half(x) sin, in place. q: (N, H, D), k: (N, H_kv, D), cos and sin: (N, D)."""
    for x in (q, k):
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        x.copy_(x.float() * cos.float()[:, None] + sign * turned * sin.float()[:, None])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up. All (N, F)."""
    return F.silu(gate) * up


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, silu(gate) up). All (N, F)."""
    g, u, d = gate.float(), up.float(), dy.float()
    s = torch.sigmoid(g)
    dgate, dup = d * u * s * (1.0 + g * (1.0 - s)), d * g * s
    return dgate.to(gate.dtype), dup.to(gate.dtype), F.silu(gate) * up


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


def _dropped(x: Tensor, keys: Tensor | None, seed: int, threshold: int) -> Tensor:
    """x with zeros where dropout drops; the others keep their size."""
    return x if keys is None else x * kept(keys, seed & WORD, threshold, x.shape[-1])


def add_lora(
    y: Sequence[Tensor],
    x: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    plus: Tensor | None,
    scaling: float,
    keys: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    """y_g <- y_g + plus + scaling h_g B_g^T,  h_g = drop_g(x) A_g^T, for G layers with one input.

    Args:
        y: (N, D_out) each, changed in place.
        x: (N, D_in).
        A: (R, D_in) each.
        B: (D_out, R) each.
        plus: (N, D_out) or None, the same for every y.
        scaling: of the product; with dropout it includes 1 / (1 - p).
        keys: (N,) int64 of dropout, or None for none; see `kept`.
        seed: of the first layer's site, as int32; the next layers are the next sites.
        threshold: p 2^16.

    Returns:
        h: (N, G R), in the dtype of x.
    """
    inner = []
    for g, (own, a, b) in enumerate(zip(y, A, B, strict=True)):
        h = _dropped(x, keys, seed + g * OF_SITE, threshold) @ a.to(x.dtype).mT
        delta = scaling * (h.float() @ b.to(x.dtype).float().mT)
        own.copy_(own.float() + (delta if plus is None else delta + plus.float()))
        inner.append(h)
    return torch.cat(inner, dim=1)


def lora_input_gradient(
    dx: Tensor,
    dy: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: float,
    keys: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    """dx <- dx + sum_g drop_g(dh_g A_g),  dh_g = scaling dy_g B_g; gives dh (N, G R). dx: (N, D_in), in place."""
    inner = []
    for g, (own, a, b) in enumerate(zip(dy, A, B, strict=True)):
        dh = (scaling * (own.float() @ b.to(dx.dtype).float())).to(dx.dtype)
        dx.copy_(dx.float() + _dropped((dh @ a.to(dx.dtype)).float(), keys, seed + g * OF_SITE, threshold))
        inner.append(dh)
    return torch.cat(inner, dim=1)


def lora_factor_gradients(
    dA: Sequence[Tensor],
    dB: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
    dh: Tensor,
    dy: Sequence[Tensor],
    scaling: float,
    keys: Tensor | None,
    seed: int,
    threshold: int,
) -> None:
    """dA_g <- dA_g + dh_g^T drop_g(x),  dB_g <- dB_g + scaling dy_g^T h_g, float32, in place."""
    R = dA[0].shape[0]
    for g, (a, b, own) in enumerate(zip(dA, dB, dy, strict=True)):
        part = slice(g * R, (g + 1) * R)
        a += dh[:, part].float().mT @ _dropped(x, keys, seed + g * OF_SITE, threshold).float()
        b += scaling * (own.float().mT @ h[:, part].float())


def add_mixed_lora(
    y: Sequence[Tensor],
    x: Tensor,
    flats: Sequence[Tensor],
    adapters: Tensor,
    places: Tensor,
    addresses: Tensor,
    ranks: Tensor,
    layers: Sequence[int],
    most: int,
    plus: Tensor | None,
) -> None:
    """y_g <- y_g + plus + (x A^T) B with the factors of each row's own adapter, for G layers with one input.

    Args:
        y: (N, D_out) each, changed in place.
        x: (N, D_in).
        flats: the S adapters: A (R, D_in) and the scaled B (R, D_out) of each layer lie in such a flat tensor.
        adapters: (N,) int64, the adapter of each row, -1 for none.
        places: (S, L, 2) int64, the first element of A and of B in the flat tensor, -1 for none.
        addresses: (S, L, 2) int64, the same as addresses of memory, 0 for none. The Triton program reads these.
        ranks: (S,) int64.
        layers: the G numbers of the layers.
        most: the largest rank.
        plus: (N, D_out) or None.
    """
    rows, starts, sizes = adapters.tolist(), places.tolist(), ranks.tolist()
    for own, layer in zip(y, layers, strict=True):
        total = own.float() if plus is None else own.float() + plus.float()
        for row, s in enumerate(rows):
            if s < 0 or starts[s][layer][0] < 0:
                continue
            (a, b), R, d_in, d_out = starts[s][layer], sizes[s], x.shape[1], own.shape[1]
            A, B = flats[s][a : a + R * d_in].view(R, d_in), flats[s][b : b + R * d_out].view(R, d_out)
            total[row] += (x[row].float() @ A.float().mT).to(x.dtype).float() @ B.float()
        own.copy_(total)


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
    """softmax(scaling q k^T) v of rows that follow one another. A causal row's last query sees all of its keys.

    Args:
        q: (N, H, D).
        k: (M, H_kv, D).
        v: (M, H_kv, D).
        starts: (B + 1,) int32, where each row's queries begin, and the end of the last.
        key_starts: (B + 1,) int32.
        most: queries of the longest row.
        most_keys: keys of the longest row.
        causal: whether a query sees only the keys up to its own place.
        window: |key - query| below it is visible; 0 for no window.
        scaling: of the scores.

    Returns:
        (N, H, D), and the logarithm of each query's sum of exponentials, (H, N) float32.

    Source: Dao 2023, "FlashAttention-2".
    """
    y, log_sum = torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0], device=q.device)
    edges, key_edges = starts.tolist(), key_starts.tolist()
    for row in range(len(edges) - 1):
        here, there = slice(edges[row], edges[row + 1]), slice(key_edges[row], key_edges[row + 1])
        y[here], log_sum[:, here] = _row(q[here], k[there], v[there], causal, window, scaling)
    return y, log_sum


def _row(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scaling: float) -> tuple[Tensor, Tensor]:
    """One row: (T, H, D), (S, H_kv, D) -> (T, H, D), (H, T)."""
    scores, values = _scores(q, k, causal, window, scaling), _heads(v, q.shape[1])
    return (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype), scores.logsumexp(-1)


def _heads(x: Tensor, count: int) -> Tensor:
    """(S, H_kv, D) -> (H, S, D) float32: every head of keys for the queries that share it."""
    return x.repeat_interleave(count // x.shape[1], dim=1).float().transpose(0, 1)


def _scores(q: Tensor, k: Tensor, causal: bool, window: int, scaling: float) -> Tensor:
    """(H, T, S) float32, -inf where a key is hidden."""
    scores = scaling * (q.float().transpose(0, 1) @ _heads(k, q.shape[1]).mT)
    T, S = scores.shape[1:]
    behind = torch.arange(T, device=q.device)[:, None] + (S - T) - torch.arange(S, device=q.device)[None]
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if causal:
        hidden |= behind < 0
    if window:
        hidden |= behind.abs() >= window
    return scores.masked_fill(hidden, -torch.inf)


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
    """(dq, dk, dv) of `attention`, from its arguments and results.

    P = softmax(scores);  dv = P^T dy;  dS = P (dy v^T - sum(dy v^T P));  dq = scaling dS k;  dk = scaling dS^T q.
    """
    dq, dk, dv = (torch.zeros_like(each) for each in (q, k, v))
    edges, key_edges = starts.tolist(), key_starts.tolist()
    for row in range(len(edges) - 1):
        here, there = slice(edges[row], edges[row + 1]), slice(key_edges[row], key_edges[row + 1])
        P = _scores(q[here], k[there], causal, window, scaling).softmax(-1)  # (H, T, S)
        keys, values = (_heads(each[there], q.shape[1]) for each in (k, v))
        queries, own = (each[here].float().transpose(0, 1) for each in (q, dy))  # (H, T, D)
        dP = own @ values.mT
        dS = scaling * P * (dP - (dP * P).sum(-1, keepdim=True))
        dq[here] = (dS @ keys).transpose(0, 1).to(q.dtype)
        for whole, part in ((dk, dS.mT @ queries), (dv, P.mT @ own)):  # (H, S, D), summed over queries that share keys
            shared = part.view(k.shape[1], -1, *part.shape[1:]).sum(1)
            whole[there] = shared.transpose(0, 1).to(k.dtype)
    return dq, dk, dv


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
    """One new token of each row: rotate q and k, write k and v into the cache, and attend to all keys of the row.

    Args:
        q: (B, H, D).
        k: (B, H_kv, D).
        v: (B, H_kv, D).
        cos: (B, D); sin: (B, D).
        keys: (B, H_kv, S, D), any strides but the last; the new token is written at `lengths - 1`.
        values: the same.
        lengths: (B,) int64, tokens of each row with its new one.
        prefixes: (B,) int64, tokens of each prefix, which a window does not hide.
        window: newest - key below it is visible; 0 for no window.
        scaling: of the scores.

    Returns:
        (B, H, D).
    """
    q, k = q.clone(), k.clone()
    rotate(q, k, cos, sin, 1.0)
    rows, newest = torch.arange(len(q), device=q.device), lengths - 1
    keys[rows, :, newest], values[rows, :, newest] = k, v
    B, heads, S = keys.shape[:3]
    queries = q.float().view(B, heads, -1, q.shape[2])  # (B, H_kv, G, D)
    scores = scaling * (queries @ keys.float().mT)  # (B, H_kv, G, S)
    column = torch.arange(S, device=q.device)[None]
    hidden = column > newest[:, None]
    if window:
        hidden |= (newest[:, None] - column >= window) & (column >= prefixes[:, None])
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    y = scores.softmax(-1) @ values.float()
    return y.view(B, -1, q.shape[2]).to(q.dtype)
