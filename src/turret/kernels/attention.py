"""Attention over unpadded rows, and of one query a row over a cache (attention.inc.c, step.inc.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from turret.kernels.arguments import AttentionRows, CachedKVArguments, DropoutArguments, Prefixes, words_of
from turret.kernels.calls import Calls, p, threads


class Attention(Calls):
    """Axes: B rows, N tokens of all rows, H heads, P prefix, D head size."""

    def attention(
        self, rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor]:
        """(y (N, H, D), log_sum (N, H) float32) of every row of an unpadded batch by itself.

        q: (N, H, D); k, v: (M, H_kv, D), the last axis contiguous. y = dropout(softmax(scaling q k^T + bias)) v.
        """
        y, log_sum = q.new_empty(q.shape), torch.empty(q.shape[:2], dtype=torch.float32)
        words, _kept = words_of(rows, q, k, v, prefixes, dropped)
        self._call("attention", q.dtype, ctypes.byref(words), p(q), p(k), p(v), p(y), p(log_sum), threads())
        return y, log_sum

    def attention_backward(
        self,
        rows: AttentionRows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefixes: Prefixes,
        dropped: DropoutArguments,
        dy: Tensor,
        log_sum: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(dq, dk, dv, dprefixes (B, 2, H_kv, P, D) float32 with P of the longest prefix; a shorter one has less)."""
        dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype) for each in (q, k, v))
        if not rows.all_asked:
            dq.zero_()
        words, _kept = words_of(rows, q, k, v, prefixes, dropped)
        dprefixes = torch.zeros(rows.count, 2, k.shape[1], words.most_prefix, q.shape[2])
        self._call("attention_backward", q.dtype, ctypes.byref(words), p(q), p(k), p(v), p(dy), p(log_sum), p(dq),
                   p(dk), p(dv), p(dprefixes), threads())  # fmt: skip
        return dq, dk, dv, dprefixes

    def keep_step(
        self, kept: CachedKVArguments, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor
    ) -> None:
        """The newest token of every row into the cache. new_keys, new_values: (B, H_kv, D), of the same strides."""
        kept.require(keys, values)
        assert new_keys.shape == new_values.shape == kept.shape
        assert new_keys.stride() == new_values.stride()
        assert new_keys.stride(-1) == 1
        new = new_keys.data_ptr(), new_values.data_ptr(), *new_keys.stride()[:2]
        self._call("keep_step", keys.dtype, kept.address, *new, keys.data_ptr(), values.data_ptr())

    def attend_step(
        self, kept: CachedKVArguments, q: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int = 0
    ) -> Tensor:
        """softmax(scaling q K^T) V of one query a row: q (B, H, D) whose last axis is contiguous -> (B, H, D)."""
        kept.require(keys, values)
        rows, heads, dim = q.shape
        assert (rows, dim) == (kept.shape[0], kept.shape[2])
        assert heads % kept.shape[1] == 0
        assert q.stride(-1) == 1
        y = q.new_empty(q.shape)
        self._call(
            "attend_step", q.dtype, kept.address, q.data_ptr(), *q.stride()[:2], heads, keys.data_ptr(),
            values.data_ptr(), scaling, window, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y
