"""The SGMV kernel: equal to the plain loop, and bit-equal for any neighbours and any number of threads."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import BOTH, adapted, close, compiled, draw, needed, spans_of
from torch import Tensor


@needed
@BOTH
@pytest.mark.parametrize("sizes", [(32, 64), (96, 32), (37, 41), (1, 1), (40, 576)])
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 16, 17, 33, 64])
def test_low_rank_equals_the_plain_loop_and_leaves_other_rows_alone(
    dtype: torch.dtype, sizes: tuple[int, int], rank: int
) -> None:
    """Spans of no, one, a few and many tokens (for tiles); one has no factors in this layer."""
    d_in, d_out = sizes
    edges = [(1, 2), (2, 2), (2, 9), (11, 34), (34, 35), (36, 101), (110, 170)]  # the last one ends at the last token
    x, y = draw(170, d_in, dtype=dtype), draw(170, d_out, dtype=dtype)
    factors: list[tuple[Tensor, Tensor] | None] = [
        (draw(rank, d_in, dtype=dtype) * d_in**-0.5, draw(rank, d_out, dtype=dtype) * rank**-0.5) for _ in edges
    ]
    factors[4] = None
    before, spans = y.clone(), spans_of(edges, factors, 170)
    compiled(dtype).low_rank(spans, 0, x, y)  # no adapter has this layer
    assert torch.equal(y, before)
    compiled(dtype).low_rank(spans, 1, x, y)
    close(y, adapted(edges, factors, x, before), dtype)
    bare = [0, 9, 10, 34, 35, *range(101, 110)]
    assert torch.equal(y[bare], before[bare])


@needed
@BOTH
@pytest.mark.parametrize("edges", [[(0, 1), (1, 7)], [(0, 40), (40, 90)]])
def test_low_rank_of_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, edges: list[tuple[int, int]]) -> None:
    x, y = draw(90, 64, dtype=dtype), draw(90, 96, dtype=dtype)
    factors = [(draw(8, 64, dtype=dtype), draw(8, 96, dtype=dtype)) for _ in edges]
    together, alone, poisoned = y.clone(), y.clone(), x.clone()
    compiled(dtype).low_rank(spans_of(edges, list(factors), 90), 1, x, together)
    poisoned[edges[1][0] :] = float("nan")  # rows of another adapter, which may be read together with the last one
    compiled(dtype).low_rank(spans_of(edges[:1], list(factors[:1]), 90), 1, poisoned, alone)
    assert torch.equal(together[: edges[0][1]], alone[: edges[0][1]])


@needed
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx2"), reason="narrower vectors promise no order")
@BOTH
@pytest.mark.parametrize("sizes", [(64, 96), (384, 40), (37, 41)])
@pytest.mark.parametrize("rank", [1, 3, 8, 17])
def test_low_rank_of_a_token_is_the_same_in_a_span_as_alone(
    dtype: torch.dtype, sizes: tuple[int, int], rank: int
) -> None:
    """Tokens are multiplied in blocks and the rest one by one; the place in a span must not matter."""
    x, y = draw(7, sizes[0], dtype=dtype), draw(7, sizes[1], dtype=dtype)
    factors = (draw(rank, sizes[0], dtype=dtype), draw(rank, sizes[1], dtype=dtype))
    together, alone = y.clone(), y.clone()
    compiled(dtype).low_rank(spans_of([(0, 7)], [factors], 7), 1, x, together)
    compiled(dtype).low_rank(spans_of([(t, t + 1) for t in range(7)], [factors] * 7, 7), 1, x, alone)
    assert torch.equal(together, alone)


@needed
@pytest.mark.parametrize("edges", [[(0, 200), (200, 201), (201, 390)], [(3, 60), (61, 62)], [(0, 180)]])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_low_rank_is_bit_equal_for_any_number_of_threads(threads: int, edges: list[tuple[int, int]]) -> None:
    """Threads split spans at any token, so that their work is equal, and leave none out."""
    x, y = draw(400, 128, dtype=torch.bfloat16), draw(400, 128, dtype=torch.bfloat16)
    ranks = (8, 3, 16)
    factors = [
        (draw(r, 128, dtype=torch.bfloat16), draw(r, 128, dtype=torch.bfloat16))
        for _, r in zip(edges, ranks, strict=False)
    ]
    given, kept = [], torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            given.append(y.clone())
            compiled(torch.bfloat16).low_rank(spans_of(edges, list(factors), 400), 1, x, given[-1])
    finally:
        torch.set_num_threads(kept)
    assert torch.equal(*given)
    changed = (given[1] != y).any(1)
    assert [bool(changed[start:end].all()) for start, end in edges] == [True] * len(edges)
    assert int(changed.sum()) == sum(end - start for start, end in edges)


@needed
@BOTH
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_buffer_of_an_adapter_is_bit_equal_to_torchs(rank: int, dtype: torch.dtype) -> None:
    factors = [(draw(rank, d_in), draw(d_out, rank)) for d_in, d_out in ((64, 96), (37, 41), (1, 1))]
    factors[1][0][0, 5] = float("nan")
    run = torch.empty(sum(A.numel() + B.numel() for A, B in factors), dtype=dtype)
    compiled(dtype).lay_out(factors, 1.7, run)
    parts = [part for A, B in factors for part in (A.to(dtype), (B.mT * 1.7).to(dtype))]
    assert torch.equal(run.nan_to_num(9.0), torch.cat([part.flatten() for part in parts]).nan_to_num(9.0))
