"""Every kernel against torch on odd shapes, attention against the plain one, and every way to have no kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import build
from torch import Tensor

from turret import kernels
from turret.adapters import attach, packed
from turret.adapters.attend import attend_plainly
from turret.kernels import KEPT, Dropped, Kept, Library, Prefixes, Rows, Spans
from turret.kernels.build import SWITCH, NotBuilt, library_path
from turret.methods import LoRA, Prefix

TOLERANCES = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 3e-2}}
BOTH = pytest.mark.parametrize("dtype", list(TOLERANCES))
HAS_COMPILER = sys.platform == "linux" and any(shutil.which(name) for name in ("cc", "gcc", "clang"))
needed = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler on this machine")


def compiled() -> Library:
    found = kernels.library()
    assert found is not None, kernels.why()  # a machine with a compiler has kernels; this is no reason to skip
    return found


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), **TOLERANCES[dtype])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


# --- elementwise ------------------------------------------------------------------------------------------------------


@needed
@BOTH
@pytest.mark.parametrize("size", [1, 31, 32, 127, 128, 129, 8191, 20_000])
def test_activations_and_their_gradients_are_torchs_at_every_size(dtype: torch.dtype, size: int) -> None:
    gate, up, dy = (4 * draw(size, dtype=dtype) for _ in range(3))
    wide, wider = gate.double().requires_grad_(), up.double().requires_grad_()
    y = torch.nn.functional.silu(wide) * wider
    close(compiled().swiglu(gate, up) / 16, y / 16, dtype)
    for ours, theirs in zip(
        compiled().swiglu_backward(gate, up, dy), torch.autograd.grad(y, (wide, wider), dy.double()), strict=True
    ):
        close(ours / 64, theirs / 64, dtype)
    y = torch.nn.functional.gelu(wide)
    close(compiled().gelu(gate) / 4, y / 4, dtype)
    close(compiled().gelu_backward(gate, dy) / 4, torch.autograd.grad(y, wide, dy.double())[0] / 4, dtype)


@needed
def test_the_ends_of_the_number_line_neither_overflow_nor_hide() -> None:
    x = torch.tensor([-1e30, -200.0, -100.0, -88.0, 0.0, 88.0, 200.0, 1e30])
    ones = torch.ones_like(x)
    torch.testing.assert_close(compiled().swiglu(x, ones), torch.nn.functional.silu(x))
    torch.testing.assert_close(compiled().gelu(x), torch.nn.functional.gelu(x), atol=1e-6, rtol=1e-5)
    for dtype in TOLERANCES:
        lost = torch.full((40,), float("nan"), dtype=dtype)
        assert compiled().swiglu(lost, ones[:1].expand(40).to(dtype).contiguous()).isnan().all()
        assert compiled().gelu(lost).isnan().all()


@needed
@BOTH
def test_dropout_keeps_its_share_and_the_same_seeds_keep_the_same(dtype: torch.dtype) -> None:
    x = draw(1_000_003, dtype=dtype).abs() + 1  # a zero of its own would look dropped
    dropped = Dropped.of(0.3, (7, 8))
    y = compiled().dropout(x, dropped)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(0.7, abs=2e-3)
    close(y[kept], x[kept].double() / 0.7, dtype)
    assert torch.equal(kept, compiled().dropout(torch.ones_like(x), dropped) != 0)
    assert not torch.equal(kept, compiled().dropout(torch.ones_like(x), Dropped.of(0.3, (7, 9))) != 0)


@needed
@BOTH
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 8), (9, 64), (2, 100)])
def test_rotation_is_undone_by_its_transpose(dtype: torch.dtype, heads: int, dim: int) -> None:
    x, angle = draw(5, heads, dim, dtype=dtype), torch.rand(5, dim // 2).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    turned = compiled().rotate(strided, cos, sin, 1.0)
    half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
    close(turned, x.double() * cos.double()[:, None] + half.double() * sin.double()[:, None], dtype)
    close(compiled().rotate(turned, cos, sin, -1.0), x, dtype)
    assert not torch.allclose(turned.float(), x.float(), atol=0.05)  # the control


# --- factors of many adapters -----------------------------------------------------------------------------------------


def spans_of(edges: list[tuple[int, int]], factors: list[tuple[Tensor, Tensor] | None], tokens: int) -> Spans:
    """A middle layer of three; the others have no factors."""
    there = [(0, 0) if each is None else (each[0].data_ptr(), each[1].data_ptr()) for each in factors]
    addresses = torch.tensor([[(0, 0), pair, (0, 0)] for pair in there])
    starts, ends = (torch.tensor(side) for side in zip(*edges, strict=True))
    ranks = torch.tensor([1 if each is None else len(each[0]) for each in factors])
    return Spans(starts, ends, ranks, addresses, tokens)


def adapted(edges: list[tuple[int, int]], factors: list[tuple[Tensor, Tensor] | None], x: Tensor, y: Tensor) -> Tensor:
    """The plain loop."""
    wide = y.double()
    for (start, end), pair in zip(edges, factors, strict=True):
        if pair is not None:
            wide[start:end] += x[start:end].double() @ pair[0].double().mT @ pair[1].double()
    return wide


@needed
@BOTH
@pytest.mark.parametrize("sizes", [(32, 64), (96, 32), (37, 41), (1, 1), (40, 576)])
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 16, 17, 33, 64])
def test_low_rank_is_the_plain_loop_and_leaves_bare_rows_alone(
    dtype: torch.dtype, sizes: tuple[int, int], rank: int
) -> None:
    """Spans of one token, of a few, of none, and of so many that tiles take them; one without factors in this layer."""
    d_in, d_out = sizes
    edges = [(1, 2), (2, 2), (2, 9), (11, 34), (34, 35), (36, 101), (110, 170)]  # the last ends with the tokens
    x, y = draw(170, d_in, dtype=dtype), draw(170, d_out, dtype=dtype)
    factors: list[tuple[Tensor, Tensor] | None] = [
        (draw(rank, d_in, dtype=dtype) * d_in**-0.5, draw(rank, d_out, dtype=dtype) * rank**-0.5) for _ in edges
    ]
    factors[4] = None
    before, spans = y.clone(), spans_of(edges, factors, 170)
    compiled().low_rank(spans, 0, x, y)  # nobody adapts this layer
    assert torch.equal(y, before)
    compiled().low_rank(spans, 1, x, y)
    close(y, adapted(edges, factors, x, before), dtype)
    bare = [0, 9, 10, 34, 35, *range(101, 110)]
    assert torch.equal(y[bare], before[bare])


@needed
@BOTH
@pytest.mark.parametrize("edges", [[(0, 1), (1, 7)], [(0, 40), (40, 90)]])
def test_low_rank_of_a_row_does_not_depend_on_who_lies_beside_it(
    dtype: torch.dtype, edges: list[tuple[int, int]]
) -> None:
    x, y = draw(90, 64, dtype=dtype), draw(90, 96, dtype=dtype)
    factors = [(draw(8, 64, dtype=dtype), draw(8, 96, dtype=dtype)) for _ in edges]
    together, alone, poisoned = y.clone(), y.clone(), x.clone()
    compiled().low_rank(spans_of(edges, list(factors), 90), 1, x, together)
    poisoned[edges[1][0] :] = float("nan")  # another's rows, read beside the last of ours or not
    compiled().low_rank(spans_of(edges[:1], list(factors[:1]), 90), 1, poisoned, alone)
    assert torch.equal(together[: edges[0][1]], alone[: edges[0][1]])


@needed
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx2"), reason="narrower vectors promise no order")
@BOTH
@pytest.mark.parametrize("sizes", [(64, 96), (384, 40), (37, 41)])
@pytest.mark.parametrize("rank", [1, 3, 8, 17])
def test_low_rank_of_a_token_is_the_same_among_its_neighbours_as_by_itself(
    dtype: torch.dtype, sizes: tuple[int, int], rank: int
) -> None:
    """Some tokens are multiplied at a time and the rest one by one, so places in a span must not show."""
    x, y = draw(7, sizes[0], dtype=dtype), draw(7, sizes[1], dtype=dtype)
    factors = (draw(rank, sizes[0], dtype=dtype), draw(rank, sizes[1], dtype=dtype))
    together, alone = y.clone(), y.clone()
    compiled().low_rank(spans_of([(0, 7)], [factors], 7), 1, x, together)
    compiled().low_rank(spans_of([(t, t + 1) for t in range(7)], [factors] * 7, 7), 1, x, alone)
    assert torch.equal(together, alone)


@needed
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_low_rank_is_the_same_to_the_last_bit_with_any_number_of_threads(threads: int) -> None:
    x, y = draw(400, 128, dtype=torch.bfloat16), draw(400, 128, dtype=torch.bfloat16)
    edges = [(0, 200), (200, 201), (201, 390)]
    factors = [(draw(8, 128, dtype=torch.bfloat16), draw(8, 128, dtype=torch.bfloat16)) for _ in edges]
    given, kept = [], torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            given.append(y.clone())
            compiled().low_rank(spans_of(edges, list(factors), 400), 1, x, given[-1])
    finally:
        torch.set_num_threads(kept)
    assert torch.equal(*given)


# --- a step of decoding -----------------------------------------------------------------------------------------------


@needed
@BOTH
@pytest.mark.parametrize("sizes", [(32, 64), (576, 1536), (37, 41), (1, 1), (40, 3), (384, 18)])
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 8, 16, 61, 128])
def test_linear_is_torchs_product_and_a_token_is_the_same_in_any_company(
    dtype: torch.dtype, sizes: tuple[int, int], tokens: int
) -> None:
    tokens = min(tokens, compiled().few(dtype))
    if tokens == 0:
        pytest.skip("not for this processor")
    d_in, d_out = sizes
    x, weight, bias = (
        draw(tokens, d_in, dtype=dtype),
        draw(d_out, d_in, dtype=dtype) * d_in**-0.5,
        draw(d_out, dtype=dtype),
    )
    y = compiled().linear(x, weight, bias)
    close(y, x.double() @ weight.double().mT + bias.double(), dtype)
    close(compiled().linear(x, weight, None), x.double() @ weight.double().mT, dtype)
    for token in {0, tokens // 2, tokens - 1}:
        assert torch.equal(compiled().linear(x[token : token + 1], weight, bias)[0], y[token])
    poisoned = x.clone()
    poisoned[0] = float("nan")
    assert torch.equal(compiled().linear(poisoned, weight, bias)[1:], y[1:])
    assert compiled().linear(poisoned, weight, bias)[0].isnan().all()


@needed
@BOTH
@pytest.mark.parametrize("sizes", [(32, 64), (96, 32), (37, 41), (1, 1), (40, 576)])
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 17, 33])
def test_linear_adds_the_adapter_of_each_token_and_leaves_bare_ones_alone(
    dtype: torch.dtype, sizes: tuple[int, int], rank: int
) -> None:
    """Spans of one token, of none, of a few; one without factors here; an adapter alone and with the others."""
    tokens = min(16, compiled().few(dtype))
    if tokens == 0:
        pytest.skip("not for this processor")
    d_in, d_out = sizes
    edges = [(1, 2), (2, 2), (2, 9), (9, 10), (12, 16)] if tokens == 16 else [(1, 1), (1, 2), (2, 2), (2, 3), (3, 4)]
    alone = [0, 9, 10, 11] if tokens == 16 else [0, 2]  # the last span ends with the tokens
    x, weight = draw(tokens, d_in, dtype=dtype), draw(d_out, d_in, dtype=dtype) * d_in**-0.5
    factors: list[tuple[Tensor, Tensor] | None] = [
        (draw(rank, d_in, dtype=dtype) * d_in**-0.5, draw(rank, d_out, dtype=dtype) * rank**-0.5) for _ in edges
    ]
    factors[3] = None
    bare, y = (compiled().linear(x, weight, None, spans, 1) for spans in (None, spans_of(edges, factors, tokens)))
    close(y, adapted(edges, factors, x, x.double() @ weight.double().mT), dtype)
    assert torch.equal(y[alone], bare[alone])
    assert torch.equal(compiled().linear(x, weight, None, spans_of(edges, factors, tokens), 0), bare)  # another layer
    assert not torch.equal(y[edges[-1][0] :], bare[edges[-1][0] :])
    for edge, own in zip(edges, factors, strict=True):
        only = (
            compiled().linear(
                x[edge[0] : edge[1]], weight, None, spans_of([(0, edge[1] - edge[0])], [own], edge[1] - edge[0]), 1
            )
            if edge[1] > edge[0]
            else y[0:0]
        )
        assert torch.equal(only, y[edge[0] : edge[1]])


@needed
@BOTH
@pytest.mark.parametrize("dim", [1, 16, 24, 64, 80, 128])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_a_query_sees_what_the_cache_holds_of_its_row_and_nothing_else(
    dtype: torch.dtype, dim: int, window: int
) -> None:
    lengths, prefixes = torch.tensor([1, 40, 17, 16, 9]), torch.tensor([0, 3, 0, 16, 2])
    room = draw(2, 7, 2, 48, dim, dtype=dtype)  # (keys and values, lanes, H_kv, S, D)
    new_keys, new_values, q = (draw(5, heads, dim, dtype=dtype) for heads in (2, 2, 6))
    for row, length in enumerate(lengths):
        room[:, row, :, length:] = float("nan")  # what is not there yet may be anything
    keys, values = room[0, :5, :, :40], room[1, :5, :, :40]
    kept = Kept(lengths, prefixes, keys)
    before = room.clone()
    compiled().keep_step(kept, keys, values, new_keys, new_values)
    rows = torch.arange(5)
    assert torch.equal(keys[rows, :, lengths - 1], new_keys)
    assert torch.equal(values[rows, :, lengths - 1], new_values)
    before[0][rows, :, lengths - 1], before[1][rows, :, lengths - 1] = new_keys, new_values
    assert torch.equal(before.nan_to_num(7.0), room.nan_to_num(7.0))  # and nothing else was written
    y = compiled().attend_step(kept, q, keys, values, 0.2, window)
    for row, (length, P) in enumerate(zip(lengths.tolist(), prefixes.tolist(), strict=True)):
        own, seen = (each[row, :, :length].double().repeat_interleave(3, 0) for each in (keys, values))  # (H, S, D)
        scores = 0.2 * torch.einsum("hd,hsd->hs", q[row].double(), own)
        column = torch.arange(length)
        if window:
            scores = scores.masked_fill((length - 1 - column >= window) & (column >= P), -1e30)
        close(y[row], torch.einsum("hs,hsd->hd", scores.softmax(-1), seen), dtype)
    assert torch.equal(compiled().attend_step(kept, q, keys, values, 0.2, window), y)


# --- attention --------------------------------------------------------------------------------------------------------


def plainly(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, drop: list[Tensor] | None = None
) -> Tensor:
    """Row by row in double precision, from what `Rows` says."""
    parts = []
    for row in range(rows.count):
        (t0, t), (s0, s) = (
            (int(rows.query_starts[row]), int(rows.query_lengths[row])),
            (int(rows.key_starts[row]), int(rows.key_lengths[row])),
        )
        place = prefixes.of_row[row]
        keys, values, P = k[s0 : s0 + s].transpose(0, 1), v[s0 : s0 + s].transpose(0, 1), 0
        if place is not None:
            P = prefixes.pairs[place][0].shape[1]
            keys, values = (torch.cat([a, b], 1) for a, b in zip(prefixes.pairs[place], (keys, values), strict=True))
        position = torch.arange(-P, s)[None] - torch.arange(t)[:, None]  # key - query
        real = torch.arange(-P, s)[None] >= 0
        hidden = torch.zeros_like(position, dtype=torch.bool)
        if rows.causal:
            hidden |= (position > 0) & real
        if rows.window:
            hidden |= (position.abs() >= rows.window) & real
        bias = torch.zeros(1, 1, t, P + s, dtype=q.dtype).masked_fill(hidden, -1e30)
        if rows.bias is not None:
            bias = bias + rows.bias.to(q.dtype)[:, rows.zero + position][None]
        groups = q.shape[1] // k.shape[1]
        keys, values = keys.repeat_interleave(groups, 0)[None], values.repeat_interleave(groups, 0)[None]
        queries = q[t0 : t0 + t].transpose(0, 1)[None]
        if drop is None:
            y = attend_plainly(queries, keys, values, bias, rows.scaling)
        else:
            y = ((rows.scaling * queries @ keys.mT + bias).softmax(-1) * drop[row]) @ values
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


@needed
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (3, 1)]),
    dim=st.sampled_from([1, 8, 24, 32, 64, 80]),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 5, 40]),
    biased=st.booleans(),
    prefixed=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_attention_and_its_gradients_are_the_plain_ones_for_any_rows(
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    causal: bool,
    window: int,
    biased: bool,
    prefixed: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(sum(lengths))
    H, K = heads
    n, each = sum(lengths), torch.tensor(lengths)
    starts = each.cumsum(0) - each
    pairs = [(draw(K, P, dim, dtype=dtype), draw(K, P, dim, dtype=dtype)) for P in (3, 33)] if prefixed else []
    of_row = [(None, 0, 1)[row % 3] if prefixed else None for row in range(len(lengths))]
    zero = 33 + max(lengths)
    bias = draw(H, zero + max(lengths)) if biased else None
    rows = Rows(starts, each, starts, each, dim**-0.5, causal, window, bias, zero)
    q, dy = draw(n, H, dim, dtype=dtype), draw(n, H, dim, dtype=dtype)
    k, v = draw(n, K, dim, dtype=dtype), draw(n, K, dim, dtype=dtype)
    prefixes = Prefixes(pairs, of_row)
    y, log_sum = compiled().attention(rows, q, k, v, prefixes, KEPT)
    dq, dk, dv, dprefix = compiled().attention_backward(rows, q, k, v, prefixes, KEPT, dy, log_sum)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wide_pairs = [(a.double().requires_grad_(), b.double().requires_grad_()) for a, b in pairs]
    expected = plainly(rows, *wide, Prefixes(wide_pairs, of_row))
    close(y, expected, dtype)
    flat = [x for pair in wide_pairs for x in pair]
    gradients = torch.autograd.grad(expected, [*wide, *flat], dy.double(), allow_unused=True)
    for ours, theirs in zip((dq, dk, dv), gradients[:3], strict=True):
        close(ours / 4, theirs / 4, dtype)
    for place in range(len(pairs)):
        P = pairs[place][0].shape[1]
        with_it = [row for row, one in enumerate(of_row) if one == place]
        for side in (0, 1):
            if with_it:
                sums = dprefix[with_it, side, :, :P].sum(0)
                close(sums / 8, gradients[3 + 2 * place + side] / 8, dtype)


@needed
@BOTH
def test_attention_drops_the_same_probabilities_forward_and_backward(dtype: torch.dtype) -> None:
    """The mask is read off a forward pass whose values are the identity; then everything is as if it were given."""
    T, dim, p = 64, 64, 0.25
    rows = Rows(torch.tensor([0]), torch.tensor([T]), torch.tensor([0]), torch.tensor([T]), 0.1, causal=False)
    none, dropped = Prefixes([], [None]), Dropped.of(p, (3, 4))
    q, k, v, dy = (draw(T, 2, dim, dtype=dtype) for _ in range(4))
    identity = torch.eye(T, dtype=dtype)[:, None].expand(T, 2, T).contiguous()
    seen = compiled().attention(rows, q, k, identity, none, dropped)[0]  # (T, 2, S): the dropped probabilities
    mask = (seen != 0).transpose(0, 1)[None].double() / (1 - p)
    assert (mask > 0).double().mean().item() == pytest.approx(1 - p, abs=0.03)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = plainly(rows, *wide, none, [mask])
    y, log_sum = compiled().attention(rows, q, k, v, none, dropped)
    close(y, expected, dtype)
    ours = compiled().attention_backward(rows, q, k, v, none, dropped, dy, log_sum)[:3]
    for mine, theirs in zip(ours, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        close(mine, theirs, dtype)
    undropped = compiled().attention(rows, q, k, v, none, KEPT)[0]
    assert not torch.allclose(undropped.float(), y.float(), atol=0.05)  # the control


@needed
def test_a_lost_number_in_one_row_stays_in_that_row() -> None:
    rows = Rows(*(torch.tensor(x) for x in ([0, 5], [5, 7], [0, 5], [5, 7])), 0.5, causal=False)
    q, k, v = draw(12, 2, 8), draw(12, 1, 8), draw(12, 1, 8)
    k[2] = float("nan")
    y, _ = compiled().attention(rows, q, k, v, Prefixes([], [None, None]), KEPT)
    assert y[:5].isnan().all()
    assert y[5:].isfinite().all()


@needed
@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "bart", "llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "method", [LoRA(lora_dropout=0.0, target_modules="all-linear"), LoRA(lora_dropout=0.0), Prefix()]
)
def test_a_model_trains_alike_with_and_without_kernels(family: str, method: LoRA | Prefix) -> None:
    classify = family in ("bert", "modernbert")
    model = attach(build(family, "classify" if classify else "generate"), method)
    model.eval()  # no dropout of the base; gradients all the same
    rows = [torch.randint(5, 60, (n,)) for n in (3, 17, 40)]

    def outcome() -> tuple[Tensor, list[Tensor]]:
        if classify:
            y = packed.classify_logits(model, rows)
        else:
            y = packed.target_logits(model, rows, [row[:4] for row in rows])
        trained = [each for each in model.parameters() if each.requires_grad]
        return y, list(torch.autograd.grad(y.square().sum(), trained, allow_unused=True))

    with kernels.without():
        plain, plain_gradients = outcome()
    fast, gradients = outcome()
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * max(1.0, float(theirs.abs().max())))


@needed
def test_the_check_at_the_first_use_works_inside_inference_mode() -> None:
    code = (
        "import torch; from turret import kernels\nwith torch.inference_mode(): assert kernels.library(), kernels.why()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- having none ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["off", "0", "No"])
def test_the_switch_takes_the_plain_path_and_says_so(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, word)
    with pytest.raises(NotBuilt, match=f"switched off by {SWITCH}"):
        library_path()


@pytest.mark.skipif(sys.platform != "linux", reason="no kernels elsewhere")
@pytest.mark.parametrize(("compiler", "expected"), [("no-such-compiler", "not found"), ("false", "failed: status 1")])
def test_without_a_working_compiler_there_is_a_reason_and_no_half_library(
    compiler: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path))
    with pytest.raises(NotBuilt, match=expected):
        library_path()
    assert not list(tmp_path.rglob("*.so"))


@needed
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").write_text("in the way")
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path))
    with pytest.raises(NotBuilt, match="cannot write"):
        library_path()


@needed
def test_processes_that_build_at_once_end_with_one_library(tmp_path: Path) -> None:
    code = "from turret.kernels.build import library_path; print(library_path())"
    environment = {**os.environ, "TURRET_CACHE": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {each.communicate(timeout=120)[0].strip() for each in started}
    assert [each.returncode for each in started] == [0, 0, 0]
    assert len(said) == 1
    assert [str(path) for path in (tmp_path / "kernels").iterdir()] == list(said)


@needed
@pytest.mark.slow
def test_attention_is_no_slower_than_what_it_replaces() -> None:
    """Sums that a compiler keeps in memory are right and twenty times slower: so with vectors wider than registers."""
    B, T, H, D = 4, 192, 8, 32
    starts, each = torch.arange(B) * T, torch.full((B,), T)
    rows = Rows(starts, each, starts, each, D**-0.5, causal=False)
    q, k, v = (torch.randn(B * T, H, D) for _ in range(3))
    prefixes = Prefixes([], [None] * B)

    def plain() -> None:
        a, b, c = (x.view(B, T, H, D).transpose(1, 2) for x in (q, k, v))
        torch.softmax(a @ b.transpose(2, 3) * D**-0.5, -1) @ c

    def least(do: Callable[[], object]) -> float:
        times = []
        for _ in range(30):
            began = time.perf_counter()
            do()
            times.append(time.perf_counter() - began)
        return min(times)

    assert least(lambda: compiled().attention(rows, q, k, v, prefixes, KEPT)) < 1.5 * least(plain)


@needed
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux tells them")
def test_a_thread_that_rests_has_no_helpers_and_another_keeps_its_own() -> None:
    script = """
import os, threading, torch
from turret import kernels
torch.set_num_threads(2)
def count(): return len(os.listdir("/proc/self/task"))
def work(): torch.randn(600, 600) @ torch.randn(600, 600); kernels.library().gelu(torch.randn(100_000))
before = count()
work()
mine = count()
done, go = threading.Event(), threading.Event()
def other():
    work(); done.set(); go.wait(); work()
thread = threading.Thread(target=other)
thread.start(); done.wait()
both = count()
kernels.rest(); kernels.rest()
left = count()
go.set(); thread.join()
work()
print(mine - before, both - mine, left - both)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert said == ["1", "2", "-1"]
