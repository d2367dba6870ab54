"""Which features a GPU has beside torch's plain operations. Each is compared with torch when it is first used there.

A missing one costs its own speed and nothing else: an AMD GPU, one older than Ampere, or a machine without Triton keeps
the others.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from turret.ops.core import REFERENCE, Ops
from turret.ops.gpu.ops import ATTENTION, DROPOUT, FEATURES, LIGER, GpuOps
from turret.ops.structs import AttentionRows, DropoutArguments, Prefixes, RMSNorm

log = logging.getLogger("turret")
OLDEST = (8, 0)  # compute capability of the first GPUs with FlashAttention 2: Ampere
DTYPES = (torch.bfloat16, torch.float16)  # FlashAttention takes no others

# --- check ------------------------------------------------------------------------------------------------------------
# Compares a feature with torch's plain operations on the CPU, on small random tensors.


ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}  # of the largest number
N, D, WIDE, HEADS, KV_HEADS, DIM = 37, 96, 160, 4, 2, 32  # no multiples of a program's block


def _liger(ops: Ops, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    draw = _drawn(device, dtype)
    x, norm, dy, plus = draw(N, D), RMSNorm(draw(D), 1e-5), draw(N, D), draw(N, D)
    y, r = ops.rms_norm(x, norm)
    found = [y, ops.rms_norm_backward(x, norm, r, dy, plus), dy]
    gate, up, dproduct = draw(N, WIDE), draw(N, WIDE), draw(N, WIDE)
    found += [ops.swiglu(gate, up), *ops.swiglu_backward(gate, up, dproduct)]
    angle = draw(N, DIM // 2).repeat(1, 2)
    for sign in (1.0, -1.0):
        found += ops.rotate(draw(N, HEADS, DIM), draw(N, KV_HEADS, DIM), angle.cos(), angle.sin(), sign)
    return found


def _dropout(ops: Ops, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    x = _drawn(device, dtype)(N, WIDE)
    keys = torch.randint(-(1 << 62), 1 << 62, (N,), generator=torch.Generator().manual_seed(1)).to(device)
    return [ops.dropout(x, DropoutArguments(seed, 1 << 14, 4 / 3, keys), 4 / 3) for seed in (7, (1 << 32) - 5)]


def _attention(ops: Ops, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Two rows of 20 and 17 queries with 3 keys more each, and a window; and without one, not causal."""
    draw, found = _drawn(device, dtype), list[Tensor]()
    starts, lengths = torch.tensor([[0, 20], [0, 23]]), torch.tensor([[20, 17], [23, 20]])
    for causal, window in ((True, 9), (False, 0)):
        q, k, v = draw(N, HEADS, DIM), draw(N + 6, KV_HEADS, DIM), draw(N + 6, KV_HEADS, DIM)
        rows = AttentionRows(starts[0], lengths[0], starts[1], lengths[1], DIM**-0.5, causal, window)
        dy = draw(*q.shape)
        if ops is REFERENCE:
            inputs = [each.float().requires_grad_() for each in (q, k, v)]
            y = attention_by_rows(rows, *inputs)
            found += [y.detach(), *torch.autograd.grad(y, inputs, dy.float())]
        else:
            none, dropped = Prefixes([], [None, None]), DropoutArguments(0, 0, 1.0, None)
            y, sums = ops.attention(rows, q, k, v, none, dropped)
            found += [y, *ops.attention_backward(rows, q, k, v, none, dropped, y, sums, dy)[:3]]
    return found


def attention_by_rows(rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of `Ops.attention`, row by row in torch's operations. Its last query sees all keys of a row."""
    parts = []
    bounds = (rows.query_starts, rows.query_lengths, rows.key_starts, rows.key_lengths)
    for start, T, key_start, S in zip(*(each.tolist() for each in bounds), strict=True):
        parts_of_row = q[start : start + T], k[key_start : key_start + S], v[key_start : key_start + S]
        a, b, c = (each.transpose(0, 1)[None] for each in parts_of_row)
        parts.append(
            F.scaled_dot_product_attention(a, b, c, visible(rows, T, S), scale=rows.scaling, enable_gqa=True)[0]
        )
    return torch.cat([each.transpose(0, 1) for each in parts])


def visible(rows: AttentionRows, T: int, S: int) -> Tensor:
    """Which of S keys each of T queries sees: (T, S) bool."""
    behind = torch.arange(T)[:, None] + (S - T) - torch.arange(S)[None]
    near = behind.abs() < rows.window if rows.window else torch.ones_like(behind, dtype=torch.bool)
    return near & (behind >= 0) if rows.causal else near


CHECKS: dict[str, Callable[[Ops, torch.device, torch.dtype], list[Tensor]]] = {
    ATTENTION: _attention,
    LIGER: _liger,
    DROPOUT: _dropout,
}


def _drawn(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Draws the same numbers for every device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype).to(device)


def largest_difference(feature: str, ops: Ops, device: torch.device, dtype: torch.dtype) -> float:
    """How far what the operations compute by a feature is from the reference, over the largest number."""
    run, worst = CHECKS[feature], 0.0
    for one, other in zip(run(REFERENCE, torch.device("cpu"), dtype), run(ops, device, dtype), strict=True):
        one, other = one.double(), other.to("cpu").double()
        if not bool(torch.isfinite(other).all()):
            return float("inf")
        worst = max(worst, float((one - other).abs().max()) / max(float(one.abs().max()), 1e-6))
    return worst


# --- available --------------------------------------------------------------------------------------------------------


def why_not(feature: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a GPU does not have a feature for this dtype; None if it has. Compiling it may take seconds, once."""
    if device.type != "cuda":
        return f"{device} is no GPU of NVIDIA or AMD"
    return _why_not(feature, device, dtype)


@functools.cache
def _why_not(feature: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if (reason := _lacking(feature, device, dtype)) is None:
        try:
            difference = largest_difference(feature, ops_with(frozenset({feature})), device, dtype)
            if difference > ALLOWED[dtype]:
                reason = f"differs from torch by {difference:.1e} of its largest number, {ALLOWED[dtype]:.0e} allowed"
        except Exception as error:  # a compiler, a driver, a build of torch: torch's plain operations still compute
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    if reason is not None and dtype in DTYPES:
        log.warning("%s computes without its fast %s: %s", device, feature, reason)
    return reason


def _lacking(feature: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is known to be missing before anything is tried."""
    if dtype not in ALLOWED:
        return f"it takes no {str(dtype).removeprefix('torch.')}"
    if feature == ATTENTION:
        if dtype not in DTYPES:
            return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
            return "the GPU is older than Ampere"
        return None
    if find_spec("triton") is None:
        return "triton is not installed"
    if feature == LIGER and find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; run: pip install 'turret[gpu]'"
    return None


@functools.cache
def ops_with(features: frozenset[str]) -> GpuOps:
    """The operations of a GPU with these features."""
    return GpuOps(features)


@functools.cache
def _ops_on(device: torch.device, dtype: torch.dtype) -> GpuOps:
    return ops_with(frozenset(each for each in FEATURES if why_not(each, device, dtype) is None))


def ops_of(x: Tensor) -> Ops:
    """The operations of a GPU for tensors like x; `REFERENCE` for any other device but one that is planned for."""
    if x.is_meta:
        return _planned.get() or REFERENCE
    return _ops_on(x.device, x.dtype) if x.device.type == "cuda" else REFERENCE


_planned: ContextVar[GpuOps | None] = ContextVar("planned", default=None)


@contextmanager
def planned(attention: bool) -> Iterator[None]:
    """Let passes on the meta device take the paths of a GPU for the length of the block.

    attention: whether the GPU has attention over rows, which decides what a pass saves.
    """
    token = _planned.set(ops_with(frozenset({ATTENTION} if attention else ())))
    try:
        yield
    finally:
        _planned.reset(token)
