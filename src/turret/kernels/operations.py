"""The small operations between matrix products, each in one pass over memory (operations.inc.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from turret.kernels.arguments import DropoutArguments
from turret.kernels.calls import Calls, n, p, threads


class Operations(Calls):
    """Activations, dropout, norms and rotary positions, with their gradients."""

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        y = torch.empty_like(gate)
        self._call("swiglu", gate.dtype, n(gate), p(gate), p(up), p(y), threads())
        return y

    def swiglu_backward(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(dgate, dup)."""
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self._call("swiglu_backward", gate.dtype, n(gate), p(gate), p(up), p(dy), p(dgate), p(dup), threads())
        return dgate, dup

    def gelu(self, x: Tensor) -> Tensor:
        """x Phi(x), where Phi is the cumulative normal distribution."""
        y = torch.empty_like(x)
        self._call("gelu", x.dtype, n(x), p(x), p(y), threads())
        return y

    def gelu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """dx."""
        dx = torch.empty_like(x)
        self._call("gelu_backward", x.dtype, n(x), p(x), p(dy), p(dx), threads())
        return dx

    def dropout(self, x: Tensor, dropped: DropoutArguments, scale: float | None = None) -> Tensor:
        """Kept elements times `scale` (default: 1 / (1 - p)), zero elsewhere."""
        y = torch.empty_like(x)
        by = ctypes.c_float(dropped.scale if scale is None else scale)
        first, second = (ctypes.c_uint32(seed) for seed in dropped.seeds)
        self._call(
            "dropout", x.dtype, n(x), p(x), p(y), first, second, ctypes.c_uint32(dropped.threshold), by, threads()
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(weight * x r, r), r = 1 / sqrt(mean(x^2) + eps). x: (..., D), r: (...) float32."""
        width = x.shape[-1]
        y, r = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        rows = ctypes.c_long(r.numel())
        self._call(
            "rms_norm", x.dtype, rows, ctypes.c_long(width), p(x), p(weight), ctypes.c_float(eps), p(y), p(r),
            threads(),
        )  # fmt: skip
        return y, r

    def rms_norm_backward(self, x: Tensor, weight: Tensor, r: Tensor, dy: Tensor) -> Tensor:
        """dx."""
        dx = torch.empty_like(x)
        rows, width = ctypes.c_long(r.numel()), ctypes.c_long(x.shape[-1])
        self._call("rms_norm_backward", x.dtype, rows, width, p(x), p(weight), p(r), p(dy), p(dx), threads())
        return dx

    def added_norm(
        self, a: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(LayerNorm(s), s, stats), s = dropout(a) + x. stats: (..., 2) float32, mean and 1 / deviation of each row."""
        s, y, stats = torch.empty_like(a), torch.empty_like(a), torch.empty(*a.shape[:-1], 2, dtype=torch.float32)
        rows, width = ctypes.c_long(stats.numel() // 2), ctypes.c_long(a.shape[-1])
        self._call(
            "added_norm", a.dtype, rows, width, *map(p, (a, x, weight, bias)), ctypes.c_float(eps), *_mask(dropped),
            *map(p, (s, y, stats)), threads(),
        )  # fmt: skip
        return y, s, stats

    def added_norm_again(self, s: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> Tensor:
        """LayerNorm(s) again, bit-equal to the result of `added_norm`, from its s and stats."""
        y = torch.empty_like(s)
        rows, width = ctypes.c_long(stats.numel() // 2), ctypes.c_long(s.shape[-1])
        self._call("added_norm_again", s.dtype, rows, width, *map(p, (s, weight, bias, stats, y)), threads())
        return y

    def added_norm_backward(
        self, s: Tensor, weight: Tensor, stats: Tensor, dropped: DropoutArguments, dy: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(da, dx)."""
        da, dx = torch.empty_like(s), torch.empty_like(s)
        rows, width = ctypes.c_long(stats.numel() // 2), ctypes.c_long(s.shape[-1])
        self._call(
            "added_norm_backward", s.dtype, rows, width, *map(p, (s, weight, stats, dy)), *_mask(dropped), p(da),
            p(dx), threads(),
        )  # fmt: skip
        return da, dx

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        """Rotary positions: x cos + rotate_half(x) sin with sign = 1, the gradient with sign = -1.

        Args:
            x: (N, H, D), the last axis contiguous.
            cos: (N, D)
            sin: (N, D)
            sign: 1.0 or -1.0.

        Returns:
            (N, H, D), contiguous.
        """
        tokens, heads, dim = x.shape
        y = x.new_empty(tokens, heads, dim)
        self._call(
            "rotate", x.dtype, *map(ctypes.c_long, (tokens, heads, dim)), p(x), *map(ctypes.c_long, x.stride()[:2]),
            p(cos), p(sin), ctypes.c_float(sign), p(y), threads(),
        )  # fmt: skip
        return y


def _mask(dropped: DropoutArguments) -> tuple[ctypes.c_uint32 | ctypes.c_float, ...]:
    """(seed, other seed, threshold, scale)."""
    return *map(ctypes.c_uint32, (*dropped.seeds, dropped.threshold)), ctypes.c_float(dropped.scale)
