"""The kernels of a decode step: products of few tokens, attention over the KV cache."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import BOTH, adapted, close, compiled, draw, needed, spans_of
from torch import Tensor

from turret.ops.cpu.compiled import CpuKVStep


@needed
@BOTH
@pytest.mark.parametrize("sizes", [(32, 64), (576, 1536), (37, 41), (1, 1), (40, 3), (384, 18)])
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 8, 16, 17, 61, 128, 200])
def test_linear_equals_torchs_product_and_a_token_does_not_depend_on_others(
    dtype: torch.dtype, sizes: tuple[int, int], tokens: int
) -> None:
    tokens = min(tokens, compiled(dtype).few)
    if tokens == 0:
        pytest.skip("not for this processor")
    d_in, d_out = sizes
    x, weight, bias = (
        draw(tokens, d_in, dtype=dtype),
        draw(d_out, d_in, dtype=dtype) * d_in**-0.5,
        draw(d_out, dtype=dtype),
    )
    y = compiled(dtype).linear_few(x, weight, bias)
    close(y, x.double() @ weight.double().mT + bias.double(), dtype)
    close(compiled(dtype).linear_few(x, weight, None), x.double() @ weight.double().mT, dtype)
    for token in {0, tokens // 2, tokens - 1}:
        assert torch.equal(compiled(dtype).linear_few(x[token : token + 1], weight, bias)[0], y[token])
    poisoned = x.clone()
    poisoned[0] = float("nan")
    assert torch.equal(compiled(dtype).linear_few(poisoned, weight, bias)[1:], y[1:])
    assert compiled(dtype).linear_few(poisoned, weight, bias)[0].isnan().all()


@needed
@BOTH
@pytest.mark.parametrize("sizes", [(32, 64), (96, 32), (37, 41), (1, 1), (40, 576)])
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 17, 33])
def test_linear_adds_the_adapter_of_each_token_and_leaves_others_alone(
    dtype: torch.dtype, sizes: tuple[int, int], rank: int
) -> None:
    """Spans of no, one and a few tokens; one has no factors here; an adapter alone and with others."""
    tokens = min(16, compiled(dtype).few)
    if tokens == 0:
        pytest.skip("not for this processor")
    d_in, d_out = sizes
    edges = [(1, 2), (2, 2), (2, 9), (9, 10), (12, 16)] if tokens == 16 else [(1, 1), (1, 2), (2, 2), (2, 3), (3, 4)]
    alone = [0, 9, 10, 11] if tokens == 16 else [0, 2]  # the last span ends at the last token
    x, weight = draw(tokens, d_in, dtype=dtype), draw(d_out, d_in, dtype=dtype) * d_in**-0.5
    factors: list[tuple[Tensor, Tensor] | None] = [
        (draw(rank, d_in, dtype=dtype) * d_in**-0.5, draw(rank, d_out, dtype=dtype) * rank**-0.5) for _ in edges
    ]
    factors[3] = None
    ops, spans = compiled(dtype), spans_of(edges, factors, tokens)
    bare, y = (ops.linear_few(x, weight, None, spans=each, layer=1) for each in (None, spans))
    close(y, adapted(edges, factors, x, x.double() @ weight.double().mT), dtype)
    assert torch.equal(y[alone], bare[alone])
    assert torch.equal(ops.linear_few(x, weight, None, spans=spans), bare)  # another layer
    assert not torch.equal(y[edges[-1][0] :], bare[edges[-1][0] :])
    for edge, own in zip(edges, factors, strict=True):
        count = edge[1] - edge[0]
        own_spans = spans_of([(0, count)], [own], count)
        few = x[edge[0] : edge[1]]
        only = ops.linear_few(few, weight, None, spans=own_spans, layer=1) if count > 0 else y[0:0]
        assert torch.equal(only, y[edge[0] : edge[1]])


@needed
@BOTH
@pytest.mark.parametrize("dim", [1, 16, 24, 64, 80, 128])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_a_query_sees_only_the_cached_keys_of_its_row(dtype: torch.dtype, dim: int, window: int) -> None:
    lengths, prefixes = torch.tensor([1, 40, 17, 16, 9]), torch.tensor([0, 3, 0, 16, 2])
    room = draw(2, 7, 2, 48, dim, dtype=dtype)  # (keys and values, slots, H_kv, S, D)
    new_keys, new_values, q = (draw(5, heads, dim, dtype=dtype) for heads in (2, 2, 6))
    for row, length in enumerate(lengths):
        room[:, row, :, length:] = float("nan")  # unused places may hold anything
    keys, values = room[0, :5, :, :40], room[1, :5, :, :40]
    step = CpuKVStep(compiled(dtype), lengths, prefixes, keys)
    before = room.clone()
    assert step.keep(keys, values, new_keys, new_values)
    rows = torch.arange(5)
    assert torch.equal(keys[rows, :, lengths - 1], new_keys)
    assert torch.equal(values[rows, :, lengths - 1], new_values)
    before[0][rows, :, lengths - 1], before[1][rows, :, lengths - 1] = new_keys, new_values
    assert torch.equal(before.nan_to_num(7.0), room.nan_to_num(7.0))  # nothing else was written
    y = step.attend(q, keys, values, 0.2, window)
    assert y is not None
    for row, (length, P) in enumerate(zip(lengths.tolist(), prefixes.tolist(), strict=True)):
        own, seen = (each[row, :, :length].double().repeat_interleave(3, 0) for each in (keys, values))  # (H, S, D)
        scores = 0.2 * torch.einsum("hd,hsd->hs", q[row].double(), own)
        column = torch.arange(length)
        if window:
            scores = scores.masked_fill((length - 1 - column >= window) & (column >= P), -1e30)
        close(y[row], torch.einsum("hs,hsd->hd", scores.softmax(-1), seen), dtype)
    again = step.attend(q, keys, values, 0.2, window)
    assert again is not None
    assert torch.equal(again, y)
