"""Attention over unpadded rows, and of one query per row over a KV cache (attention.inc.c, step.inc.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from turret.kernels.arguments import AttentionRows, CachedKVArguments, DropoutArguments, Prefixes, rows_struct
from turret.kernels.calls import Calls, p, threads


class Attention(Calls):
    """Axes: B rows, N tokens of all rows, H heads, P prefix, D head size."""

    def attention(
        self, rows: AttentionRows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, dropped: DropoutArguments
    ) -> tuple[Tensor, Tensor]:
        """y = dropout(softmax(scaling q k^T + bias)) v, for each row of an unpadded batch alone.

        Args:
            rows: The place of each row.
            q: (N, H, D), the last axis contiguous.
            k: (M, H_kv, D), likewise.
            v: (M, H_kv, D), likewise.
            prefixes: Come before the keys and values of their rows.
            dropped: Dropout of the probabilities.

        Returns:
            y (N, H, D), and the logarithm of each row's sum of exponentials, (N, H) float32, for the backward pass.
        """
        y, log_sum = q.new_empty(q.shape), torch.empty(q.shape[:2], dtype=torch.float32)
        struct = rows_struct(rows, q, k, v, prefixes, dropped)
        self._call("attention", q.dtype, _address(struct), p(q), p(k), p(v), p(y), p(log_sum), threads())
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
        """The gradients of `attention`: (dq, dk, dv, dprefixes).

        dprefixes: (B, 2, H_kv, P, D) float32 with P of the longest prefix; the rest of a shorter one is zero.
        """
        dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype) for each in (q, k, v))
        if not rows.all_asked:
            dq.zero_()
        struct = rows_struct(rows, q, k, v, prefixes, dropped)
        dprefixes = torch.zeros(rows.count, 2, k.shape[1], struct.most_prefix, q.shape[2])
        self._call("attention_backward", q.dtype, _address(struct), p(q), p(k), p(v), p(dy), p(log_sum), p(dq),
                   p(dk), p(dv), p(dprefixes), threads())  # fmt: skip
        return dq, dk, dv, dprefixes

    def keep_step(
        self, kept: CachedKVArguments, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor
    ) -> None:
        """Write the newest token of each row to the cache. new_keys, new_values: (B, H_kv, D), of equal strides."""
        kept.require(keys, values)
        assert new_keys.shape == new_values.shape == kept.shape
        assert new_keys.stride() == new_values.stride()
        assert new_keys.stride(-1) == 1
        new = new_keys.data_ptr(), new_values.data_ptr(), *new_keys.stride()[:2]
        self._call("keep_step", keys.dtype, kept.address, *new, keys.data_ptr(), values.data_ptr())

    def attend_step(
        self, kept: CachedKVArguments, q: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int = 0
    ) -> Tensor:
        """softmax(scaling q K^T) V of one query per row.

        Args:
            kept: The rows of the cache.
            q: (B, H, D), the last axis contiguous.
            keys: (B, H_kv, S, D)
            values: (B, H_kv, S, D)
            scaling: Of the scores.
            window: 0 for none; else a key further back is seen only if it belongs to the prefix.

        Returns:
            (B, H, D)
        """
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


def _address(struct: ctypes.Structure) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(struct))
