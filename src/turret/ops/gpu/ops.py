"""The operations of a GPU: cuBLAS for all products, torch's FlashAttention, and one launch for each small operation.

What it buys over the libraries' own modules: a layer saves less, LoRA of layers with one input shares a product, rows
need no padding, and a row's prefix needs no mask.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from turret.ops.core import REFERENCE, LoraGradients, Loras, Ops, attention_by_rows, seeded_randn, to_device
from turret.ops.structs import AttentionRows, DropoutArguments, Lora, Prefixes, RMSNorm, kept_gradient

ATTENTION, LIGER, DROPOUT = FEATURES = ("attention", "liger", "dropout")  # what a GPU may have
WIDEST = 256  # numbers in a head that FlashAttention takes
log = logging.getLogger("turret")


class RowEdges(NamedTuple):
    """Where each row of a batch is among the queries and among the packed keys.

    starts, key_starts: (B + 1,) int32. order: (M,) int64, each packed key among all prefixes and then all keys; None if
    no row has a prefix.
    """

    starts: Tensor
    key_starts: Tensor
    most: int
    most_keys: int
    order: Tensor | None = None

    @classmethod
    def of(cls, rows: AttentionRows, prefixes: Prefixes, device: torch.device) -> RowEdges:
        """The edges of a batch, copied to the GPU once for all layers of a group."""
        sizes = [key.shape[1] for key, _ in prefixes.pairs]
        key = (device, tuple(sizes), tuple(prefixes.of_row))
        if key not in rows.memo:
            queries, keys, starts = (each.tolist() for each in (rows.query_lengths, rows.key_lengths, rows.key_starts))
            before, own = [0, *accumulate(sizes)], sum(sizes)  # where each prefix begins; where the rows' own keys do
            order: list[int] = []
            counts = []
            for pair, start, count in zip(prefixes.of_row, starts, keys, strict=True):
                P = 0 if pair is None else sizes[pair]
                if pair is not None:
                    order += range(before[pair], before[pair] + P)
                order += range(own + start, own + start + count)
                counts.append(P + count)
            rows.memo[key] = cls(
                to_device(torch.tensor([0, *accumulate(queries)], dtype=torch.int32), device),
                to_device(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), device),
                max(queries),
                max(counts),
                to_device(torch.tensor(order), device) if sizes else None,
            )
        return rows.memo[key]

    def pack_keys(self, keys: Tensor, prefixes: Sequence[Tensor]) -> Tensor:
        """Every row's prefix before its own keys. keys: (M, H_kv, D); prefixes: (H_kv, P, D) each."""
        if self.order is None:
            return keys.contiguous()
        every = [*(each.to(keys.dtype).transpose(0, 1) for each in prefixes), keys]
        return torch.cat(every).index_select(0, self.order)

    def unpack_gradient(
        self, gradient: Tensor, keys: Tensor, prefixes: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the keys, and of each prefix, which several rows may share."""
        if self.order is None:
            return gradient, []
        sizes = [each.shape[1] for each in prefixes]
        whole = gradient.new_zeros(sum(sizes) + len(keys), *gradient.shape[1:]).index_add_(0, self.order, gradient)
        *parts, own = torch.split(whole, [*sizes, len(keys)])
        return own, [part.transpose(0, 1).to(each.dtype) for part, each in zip(parts, prefixes, strict=True)]

    @property
    def sizes(self) -> tuple[Tensor, Tensor, int, int]:
        return self[:4]


class GpuOps(Ops):
    """By the features that a GPU has (`why_not`); torch's plain operations compute the rest.

    Args:
        features: some of `FEATURES`.
    """

    kernels = True
    layouts = frozenset({"pre-norm"})
    output_read = True

    def __init__(self, features: frozenset[str]) -> None:
        self.features = features

    def _liger(self, x: Tensor) -> ModuleType | None:
        """liger-kernel's programs, if they compute x."""
        return _module("liger") if LIGER in self.features and x.numel() else None

    # --- LoRA ---------------------------------------------------------------------------------------------------------

    def add_lora(self, y: Sequence[Tensor], x: Tensor, loras: Loras, plus: Tensor | None = None) -> list[Tensor]:
        """Layers with one input share a product: h = x [A_1; A_2; ...]^T, unless each has a mask of its own."""
        own = [(out, lora) for out, lora in zip(y, loras, strict=True) if lora is not None]
        if plus is not None:
            for out in y:
                out.add_(plus)
        if not own:
            return []
        every = _stack_factors([lora for _, lora in own], x.dtype)
        if _masked(loras):
            factors = _parts(every.mT, loras)
            inner = [self._mask_input(x, lora) @ A for (_, lora), A in zip(own, factors, strict=True)]  # (N, R) each
        else:
            inner = [x @ every.mT]  # (N, G R)
        for (out, lora), part in zip(own, _hidden(inner, loras), strict=True):
            out.addmm_(part, lora.B.to(x.dtype).mT, alpha=lora.scale)
        return inner

    def lora_backward(
        self, loras: Loras, x: Callable[[], Tensor], inner: Sequence[Tensor], dy: Sequence[Tensor], dx: Tensor | None
    ) -> LoraGradients:
        """Gradients are added in the precision of the parameters where these keep them."""
        own = [(d, lora) for d, lora in zip(dy, loras, strict=True) if lora is not None]
        if not own:
            return []
        given, every = x(), _stack_factors([lora for _, lora in own], own[0][0].dtype)
        dh = every.new_empty(len(given), len(every))  # (N, G R)
        parts = _parts(dh, loras)
        for part, (d, lora) in zip(parts, own, strict=True):
            part.addmm_(d, lora.B.to(d.dtype), beta=0.0, alpha=lora.scale)
        if not _masked(loras):
            if dx is not None:
                dx.addmm_(dh, every)
            of_A = torch.split(dh.mT @ given, [len(lora.A) for _, lora in own])
        else:
            for (_, lora), part, A in zip(own, parts, _parts(every.mT, loras), strict=True):
                if dx is not None:
                    dx.add_(self._mask_input(part @ A.mT, lora))
            of_A = tuple(part.mT @ self._mask_input(given, lora) for (_, lora), part in zip(own, parts, strict=True))
        found: LoraGradients = []
        for (d, lora), h, gradient in zip(own, _hidden(inner, loras), of_A, strict=True):
            found += [_add_gradient(lora.A, gradient, 1.0), _add_gradient(lora.B, d.mT @ h, lora.scale)]
        return found

    # --- norms, activations, positions, dropout -----------------------------------------------------------------------

    def rms_norm(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor | None]:
        if (liger := self._liger(x)) is None:
            return super().rms_norm(x, norm)
        return liger.rms_norm(x.contiguous(), *norm)

    def rms_norm_backward(
        self, x: Tensor, norm: RMSNorm, r: Tensor | None, dy: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        if (liger := self._liger(x)) is None:
            return super().rms_norm_backward(x, norm, r, dy, plus)
        dx: Tensor = liger.rms_norm_backward(x.contiguous(), norm.weight, r, dy.contiguous())
        return dx if plus is None else dx.add_(plus)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        if (liger := self._liger(gate)) is None:
            return super().swiglu(gate, up)
        return liger.swiglu(gate, up)

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        if (liger := self._liger(gate)) is None:
            return super().swiglu_backward(gate, up, dy)
        found: tuple[Tensor, Tensor] = liger.swiglu_backward(gate, up, dy.contiguous())
        increment_version(
            [gate, up]
        )  # written to: a second backward pass of the same graph is an error, not a wrong sum
        return found

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        if (liger := self._liger(q)) is None:
            return super().rotate(q, k, cos, sin, sign)
        return liger.rotate(q, k, cos, sin, sign)

    def dropout(self, x: Tensor, dropped: DropoutArguments, scale: float) -> Tensor:
        keys = dropped.keys
        if DROPOUT not in self.features or keys is None or not x.numel() or keys.numel() * x.shape[-1] != x.numel():
            return super().dropout(x, dropped, scale)
        rows = x.contiguous().view(-1, x.shape[-1])
        y: Tensor = _module("programs").dropout(rows, keys.flatten(), dropped.seed, dropped.threshold, scale)
        return y.view(x.shape)

    # --- attention ----------------------------------------------------------------------------------------------------

    def takes_attention(self, rows: AttentionRows, prefixes: Prefixes, dim: int, p: float) -> bool:
        """No dropout, no bias, no window that would hide a prefix."""
        fits = self.attends and ATTENTION in self.features and dim % 8 == 0 and dim <= WIDEST
        hidden = rows.window and prefixes.pairs
        return fits and p == 0.0 and rows.bias is None and not hidden and rows.all_asked

    def attention(
        self, rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor]:
        if q.is_meta:  # a plan
            return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        edges = RowEdges.of(rows, prefixes, q.device)
        keys, values = (edges.pack_keys(each, own) for each, own in zip((k, v), _sides(prefixes), strict=True))
        y, log_sum, *_ = torch.ops.aten._flash_attention_forward(
            q.contiguous(), keys, values, *edges.sizes, 0.0, rows.causal, False, scale=rows.scaling, **_window(rows)
        )
        return y, log_sum

    def attention_backward(
        self,
        rows: AttentionRows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefixes: Prefixes,
        dropped: DropoutArguments,
        y: Tensor | None,
        log_sum: Tensor,
        dy: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        edges, sides = RowEdges.of(rows, prefixes, q.device), _sides(prefixes)
        keys, values = (edges.pack_keys(each, own) for each, own in zip((k, v), sides, strict=True))
        none = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # of dropout
        settings = (0.0, rows.causal, *none)
        dq, dkeys, dvalues = torch.ops.aten._flash_attention_backward(
            dy, q.contiguous(), keys, values, y, log_sum, *edges.sizes, *settings, scale=rows.scaling, **_window(rows)
        )
        dk, of_keys = edges.unpack_gradient(dkeys, k, sides[0])
        dv, of_values = edges.unpack_gradient(dvalues, v, sides[1])
        return dq, dk, dv, [each for pair in zip(of_keys, of_values, strict=True) for each in pair]


def _sides(prefixes: Prefixes) -> tuple[list[Tensor], list[Tensor]]:
    """The keys and the values of all prefixes."""
    return [key for key, _ in prefixes.pairs], [value for _, value in prefixes.pairs]


def _window(rows: AttentionRows) -> dict[str, int]:
    if not rows.window:
        return {}
    return {"window_size_left": rows.window - 1, "window_size_right": 0 if rows.causal else rows.window - 1}


@functools.cache
def _module(name: str) -> ModuleType:
    """A module that needs Triton: a machine without a GPU never loads it."""
    return importlib.import_module(f"turret.ops.gpu.{name}")


def _masked(loras: Loras) -> bool:
    return any(lora is not None and lora.dropped.threshold > 0 for lora in loras)


def _stack_factors(loras: Sequence[Lora], dtype: torch.dtype) -> Tensor:
    """The A of all, (G R, D_in)."""
    return (loras[0].A if len(loras) == 1 else torch.cat([lora.A for lora in loras])).to(dtype)


def _hidden(inner: Sequence[Tensor], loras: Loras) -> Sequence[Tensor]:
    """h (N, R) of each LoRA, as `add_lora` returned it."""
    return inner if _masked(loras) else _parts(inner[0], loras)


def _parts(h: Tensor, loras: Loras) -> tuple[Tensor, ...]:
    """(..., R) of each LoRA."""
    return torch.split(h, [len(lora.A) for lora in loras if lora is not None], dim=1)


def _add_gradient(parameter: Tensor, gradient: Tensor, scale: float) -> Tensor | None:
    """Add a gradient where the parameter keeps it, else return it in the parameter's precision."""
    if (kept := kept_gradient(parameter)) is not None:
        kept.add_(gradient, alpha=scale)
        return None
    gradient = gradient.to(parameter.dtype)
    return gradient if scale == 1.0 else gradient.mul_(scale)


# --- which features a GPU has -----------------------------------------------------------------------------------------
# Each is compared with torch's plain operations on the CPU, on small random tensors, when it is first used on a GPU.
#
# A missing one costs its own speed and nothing else: an AMD GPU, one older than Ampere, or a machine without Triton
# keeps the others.


OLDEST = (8, 0)  # compute capability of the first GPUs with FlashAttention 2: Ampere
DTYPES = (torch.bfloat16, torch.float16)  # FlashAttention takes no others
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}  # of the largest number
N, D, WIDE, HEADS, KV_HEADS, DIM = 37, 96, 160, 4, 2, 32  # no multiples of a program's block


def _try_liger(ops: Ops, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    draw = seeded_randn(dtype, device)
    x, norm, dy, plus = draw(N, D), RMSNorm(draw(D), 1e-5), draw(N, D), draw(N, D)
    y, r = ops.rms_norm(x, norm)
    found = [y, ops.rms_norm_backward(x, norm, r, dy, plus), dy]
    gate, up, dproduct = draw(N, WIDE), draw(N, WIDE), draw(N, WIDE)
    found += [ops.swiglu(gate, up), *ops.swiglu_backward(gate, up, dproduct)]
    angle = draw(N, DIM // 2).repeat(1, 2)
    for sign in (1.0, -1.0):
        found += ops.rotate(draw(N, HEADS, DIM), draw(N, KV_HEADS, DIM), angle.cos(), angle.sin(), sign)
    return found


def _try_dropout(ops: Ops, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    x = seeded_randn(dtype, device)(N, WIDE)
    keys = torch.randint(-(1 << 62), 1 << 62, (N,), generator=torch.Generator().manual_seed(1)).to(device)
    return [ops.dropout(x, DropoutArguments(seed, 1 << 14, 4 / 3, keys), 4 / 3) for seed in (7, (1 << 32) - 5)]


def _try_attention(ops: Ops, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Two rows of 20 and 17 queries with 3 keys more each, and a window; and without one, not causal."""
    draw, found = seeded_randn(dtype, device), list[Tensor]()
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


CHECKS: dict[str, Callable[[Ops, torch.device, torch.dtype], list[Tensor]]] = {
    ATTENTION: _try_attention,
    LIGER: _try_liger,
    DROPOUT: _try_dropout,
}


def largest_difference(feature: str, ops: Ops, device: torch.device, dtype: torch.dtype) -> float:
    """How far what the operations compute by a feature is from the reference, over the largest number."""
    run, worst = CHECKS[feature], 0.0
    for one, other in zip(run(REFERENCE, torch.device("cpu"), dtype), run(ops, device, dtype), strict=True):
        one, other = one.double(), other.to("cpu").double()
        if not bool(torch.isfinite(other).all()):
            return float("inf")
        worst = max(worst, float((one - other).abs().max()) / max(float(one.abs().max()), 1e-6))
    return worst


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
def gpu_paths_on_meta(attention: bool) -> Iterator[None]:
    """Let passes on the meta device take the paths of a GPU for the length of the block.

    attention: whether the GPU has attention over rows, which decides what a pass saves.
    """
    token = _planned.set(ops_with(frozenset({ATTENTION} if attention else ())))
    try:
        yield
    finally:
        _planned.reset(token)
